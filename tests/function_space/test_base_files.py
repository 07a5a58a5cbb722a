"""Base files and depth maps: what does not fit is refused, and the message names the difference."""

import dataclasses
import json
import math

import pytest
import torch
from small_models import ResNet, backward, batch
from torch import nn

from layerwise.errors import LayerwiseError
from layerwise.function_space import BaseRates, FLeRM, FunctionSpaceRecorder, record_base
from layerwise.function_space.matching.decide import infer_depth, sources


def recorded(seed=0, depth=2, lr=1e-2, **options) -> BaseRates:
    model = ResNet(16, depth, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    recorder = FunctionSpaceRecorder(model, optimizer, seed=seed, **options)
    backward(model, 50 + seed)
    with recorder.step(batch(seed)[2]):
        optimizer.step()
    return BaseRates.of(recorder)


def test_a_base_file_is_read_back_as_it_was(tmp_path):
    base = BaseRates.mean([recorded(0), recorded(1)])
    base.save(tmp_path / "base.json")
    assert BaseRates.load(tmp_path / "base.json") == base
    data = json.loads((tmp_path / "base.json").read_text())
    assert data["fingerprint"]["optimizer"] == "torch.Adam"
    assert data["fingerprint"]["settings"][0]["settings"]["betas"] == "(0.9, 0.99)"
    assert data["fingerprint"]["seeds"] == [0, 1]
    one = recorded(0, probes=1)
    one.save(tmp_path / "one.json")
    assert "NaN" not in (tmp_path / "one.json").read_text()


def test_seeds_are_averaged_and_their_spread_kept():
    bases = [recorded(seed) for seed in range(3)]
    mean = BaseRates.mean(bases)
    values = [base.records[0]["inp.weight"].value for base in bases]
    rate = mean.records[0]["inp.weight"]
    assert rate.value == pytest.approx(sum(values) / 3)
    assert rate.spread == pytest.approx(torch.tensor(values).std().item(), rel=1e-5)
    assert rate.per_lr == pytest.approx(rate.value / 1e-2)
    with pytest.raises(LayerwiseError, match="different learning rates"):
        BaseRates.mean([recorded(0), recorded(1, lr=1e-3)])
    with pytest.raises(LayerwiseError, match="method is 'iid', the base has 'full_cov'"):
        BaseRates.mean([recorded(0), recorded(1, method="iid")])
    with pytest.raises(LayerwiseError, match="at least one seed"):
        record_base(lambda seed: None, seeds=())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (torch.optim.SGD, {}, "differently: optimizer is 'torch.SGD', the base has 'torch.Adam'$"),
        (torch.optim.Adam, {"betas": (0.9, 0.95)}, r"betas is \(0.9, 0.95\), the base has \(0.9, 0.99\)"),
    ],
)
def test_another_optimizer_is_refused(kind, options, message):
    model = ResNet(16, 2)
    with pytest.raises(LayerwiseError, match=message):
        FLeRM(model, kind(model.parameters(), lr=1e-2, **options), recorded())


def test_another_output_space_method_or_dtype_is_refused():
    def start(dtype=torch.float32, **options):
        model = ResNet(16, 2, dtype=dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
        return model, optimizer, FLeRM(model, optimizer, recorded(), **options)

    with pytest.raises(LayerwiseError, match="space is 'log_softmax', the base has 'output'"):
        start(forward="log_softmax")
    with pytest.raises(LayerwiseError, match="method is 'kronecker', the base has 'full_cov'"):
        start(method="kronecker")
    start(method="exact")[2].detach()  # has the same mean
    model, optimizer, flerm = start(torch.float64)
    backward(model, 0)
    with pytest.raises(LayerwiseError, match="dtype is 'float64'"), flerm.step(batch(0, torch.float64)[2]):
        optimizer.step()
    model, optimizer, flerm = start()
    backward(model, 0)
    with pytest.warns(UserWarning, match="160 output entries, this model on 40"), flerm.step(batch(0)[2][:8]):
        optimizer.step()
    # What the base was measured with is the default.
    model, optimizer, flerm = start()
    flerm.detach()
    assert FLeRM(model, optimizer, recorded(forward="log_softmax")).measurement.space == "log_softmax"


def test_damaged_files_are_one_line(tmp_path):
    path = tmp_path / "base.json"
    for text, message in [
        (None, r"cannot be read \(No such file or directory\): .* or base='uniform'"),
        (b"{", "not JSON"),
        (b"\x80\x02\xff", "not a base file.*not JSON"),
        (b"[]", "not a base file"),
        (b'{"format": 1, "name": "a run"}', "not a base file: `layerwise record` writes one"),
        (b'{"format": 2, "fingerprint": {}}', "format 2, not 1"),
        (b'{"format": 1, "fingerprint": {"settings": []}, "records": {}}', "damaged"),
        (b'{"format": 1, "fingerprint": [], "records": {}}', "damaged"),
    ]:
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(LayerwiseError, match=message) as caught:
            BaseRates.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(LayerwiseError, match=r"cannot be read \(Is a directory\)"):
        BaseRates.load(tmp_path)
    recorded().save(path)
    empty = json.loads(path.read_text()) | {"records": {}}
    path.write_text(json.dumps(empty))
    with pytest.raises(LayerwiseError, match="no records"):
        BaseRates.load(path)


@pytest.mark.parametrize(
    ("way", "odd"),
    [
        *((["records", "0", "first", "value"], bad) for bad in ("0.1", [0.1], None, True, math.nan, -1.0, math.inf)),
        *((["records", "0", "first", "lr"], bad) for bad in ("x", [], None, math.nan, 0.0)),
        (["records", "0", "first", "stderr"], "x"),
        (["records", "0", "first"], []),
        (["records", "0"], []),
        (["records", "0"], {}),
        (["records", "zero"], {}),
        (["records", "1"], {}),
        (["fingerprint", "dtype"], "float99"),
        (["fingerprint", "dtype"], None),
        (["fingerprint", "classes"], "2"),
        (["fingerprint", "seeds"], 0),
        (["fingerprint", "settings", 0, "settings"], []),
        (["fingerprint", "space"], None),
    ],
)  # fmt: skip
def test_a_base_file_with_odd_values_is_one_line(tmp_path, way, odd):
    """Words, lists, NaN, a rate at a learning rate of 0: nothing of it reaches a model."""
    path = tmp_path / "base.json"
    recorded().save(path)
    tree = json.loads(path.read_text())
    node = tree
    for key in way[:-1]:
        node = next(iter(node.values())) if key == "first" else node[key]
    node[next(iter(node)) if way[-1] == "first" else way[-1]] = odd
    path.write_text(json.dumps(tree))
    with pytest.raises(LayerwiseError, match=r"base\.json' is damaged \(.+\): record it again") as said:
        BaseRates.load(path)
    assert "\n" not in str(said.value)


def test_a_rate_of_zero_is_no_damage(tmp_path):
    """A parameter that the step did not move, or that moves no output."""
    path = tmp_path / "base.json"
    recorded().save(path)
    tree = json.loads(path.read_text())
    for rate in tree["records"]["0"].values():
        rate["value"] = 0.0
    path.write_text(json.dumps(tree))
    assert all(rate.value == 0 for rate in BaseRates.load(path).at(0).values())


def test_a_base_file_is_written_as_a_whole(tmp_path, monkeypatch):
    base, path, link = recorded(), tmp_path / "base.json", tmp_path / "link.json"
    path.write_text("old")
    link.symlink_to(path)

    def full(*names):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(LayerwiseError, match=r"cannot be written.*No space left"):
            base.save(path)
    assert path.read_text() == "old"
    base.save(link)
    assert link.is_symlink()
    assert BaseRates.load(path) == base
    assert {file.name for file in tmp_path.iterdir()} == {"base.json", "link.json"}
    for wrong in (tmp_path, tmp_path / "none" / "base.json", "/dev/null"):
        with pytest.raises(LayerwiseError, match="cannot be written"):
            base.save(wrong)


def test_depth_maps():
    base = ["inp.w", "h.0.w", "h.1.w", "out.w"]
    deep = ["inp.w", *(f"h.{i}.w" for i in range(6)), "out.w"]
    found = sources(deep, base, {"h.*": "split"})
    assert [(found[n].name, found[n].share) for n in deep] == [
        ("inp.w", 1),
        ("h.0.w", 3),
        ("h.0.w", 3),
        ("h.0.w", 3),
        ("h.1.w", 3),
        ("h.1.w", 3),
        ("h.1.w", 3),
        ("out.w", 1),
    ]
    assert {s.share for s in sources(deep, base, {"h.*": "copy"}).values()} == {1}
    assert sources(deep, None, {"h.*": 3})["h.5.w"].name == "h.2.w"
    for depth, message in [
        ({}, r"pass depth=\{'h\.\*': 'split'\}"),
        ({"x.*": "split"}, "fits no parameter of the model"),
        ({"h": "split"}, "write one \\*"),
        ({"h.*": "half"}, "'half'"),
        ({"h.*": 4}, "says 4 base blocks, the base has 2"),
    ]:
        with pytest.raises(LayerwiseError, match=message):
            sources(deep, base, depth)
    with pytest.raises(LayerwiseError, match="6 blocks, the base 4"):
        sources(deep, None, {"h.*": 4})


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_depth_is_inferred_for_transformers_models(family):
    transformers = pytest.importorskip("transformers")

    def build(width, layers):
        torch.manual_seed(0)
        if family == "GPT2":
            config = transformers.GPT2Config(n_layer=layers, n_head=2, n_embd=width, vocab_size=31, n_positions=12)
            return transformers.GPT2LMHeadModel(config)
        config = transformers.LlamaConfig(
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            hidden_size=width,
            intermediate_size=2 * width,
            vocab_size=31,
            max_position_embeddings=12,
        )
        return transformers.LlamaForCausalLM(config)

    def train(model, around):
        tokens = torch.randint(0, 31, (4, 8), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        watcher = around(model, optimizer)
        model(input_ids=tokens, labels=tokens).loss.backward()
        with watcher.step({"input_ids": tokens.flip(0)}):
            optimizer.step()
        return watcher

    base = BaseRates.of(train(build(16, 1), lambda m, o: FunctionSpaceRecorder(m, o, forward="log_softmax")))
    big = build(32, 2)
    stack = "transformer.h.*" if family == "GPT2" else "model.layers.*"
    assert infer_depth(big) == {stack: "split"}
    flerm = train(big, lambda m, o: FLeRM(m, o, base))
    name = "transformer.h.1.mlp.c_fc.weight" if family == "GPT2" else "model.layers.1.mlp.up_proj.weight"
    source = base.records[0][name.replace(".1.", ".0.")]
    assert flerm.reports[0].rows[name].target == pytest.approx(source.value / 2)


def test_lora_is_matched_once_b_has_moved():
    """At step 0 `B = 0` and A has no effect; the user keeps A fixed or not."""

    class LoRA(nn.Module):
        def __init__(self, rank):
            super().__init__()
            torch.manual_seed(0)
            self.A = nn.Parameter(torch.randn(rank, 12))
            self.B = nn.Parameter(torch.zeros(5, rank))

        def forward(self, x):
            return x[:, :5] + 8 / len(self.A) * x @ self.A.T @ self.B.T

    def train(rank, around, lr_a=1e-2):
        model = LoRA(rank)
        optimizer = torch.optim.AdamW([{"params": [model.A], "lr": lr_a}, {"params": [model.B]}], lr=1e-2)
        watcher = around(model, optimizer)
        for t in range(7):
            optimizer.zero_grad()
            backward(model, t)
            with watcher.step(batch(t)[2]):
                optimizer.step()
        return watcher

    base = BaseRates.of(train(2, lambda m, o: FunctionSpaceRecorder(m, o, every=5)))
    with pytest.warns(UserWarning, match="A"):
        early = train(8, lambda m, o: FLeRM(m, o, base))
    assert early.reports[0].left_alone == {"A": "kept: its base rate is zero or rounding noise"}
    late = train(8, lambda m, o: FLeRM(m, o, base, at=5))
    assert late.reports[0].left_alone == {}
    assert late.reports[0].rows["A"].target == pytest.approx(base.records[5]["A"].value)
    fixed = train(8, lambda m, o: FLeRM(m, o, base, at=5, fixed=["A"]))
    assert fixed.learning_rates()["A"] == 1e-2
    frozen = train(8, lambda m, o: FLeRM(m, o, base, at=5), lr_a=0.0)
    assert frozen.learning_rates()["A"] == 0.0
    assert math.isfinite(frozen.learning_rates()["B"])


def test_fingerprints_hold_what_was_measured():
    print_ = recorded().fingerprint
    assert print_.entries == 160
    assert print_.classes == 5
    assert print_.model == "ResNet"
    assert print_.shapes != recorded(depth=3).fingerprint.shapes
    assert set(print_.versions) == {"layerwise", "torch"}
    with pytest.raises(LayerwiseError, match="classes is 7"):
        print_.require({}, classes=7)
    assert dataclasses.replace(print_, entries=3) != print_
