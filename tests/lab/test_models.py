from __future__ import annotations

import math

import pytest
import torch

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import ModelConfig
from layerwise.lab.models.families import PRESETS, build_model, logits, loss, model_settings
from layerwise.lab.models.family import Examples

TOKENS = Examples(vocab_size=61, seq_len=16)
TINY = {
    "gpt2-tiny": {"n_layer": 2, "n_embd": 16, "n_head": 2},
    "llama-tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
    },
}


@pytest.mark.parametrize("preset", TINY)
def test_a_model_is_a_causal_decoder_over_the_vocabulary(preset: str) -> None:
    model = build_model(ModelConfig(preset=preset, **TINY[preset]), TOKENS, seed=0).eval()
    inputs = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = logits(model, inputs)
        changed = inputs.clone()
        changed[:, 10] = (changed[:, 10] + 1) % 61
        after = logits(model, changed)
    assert before.shape == (3, 16, 61)
    # Rounding alone differs: the same numbers go through the same products.
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-4)


def test_the_loss_is_the_mean_surprise_of_the_next_tokens() -> None:
    model = build_model(ModelConfig(preset="gpt2-tiny", **TINY["gpt2-tiny"]), TOKENS, seed=0).eval()
    inputs, targets = torch.randint(61, (2, 2, 16)).unbind()
    probability = logits(model, inputs).double().softmax(-1).gather(-1, targets[..., None])
    # float32 in the model and its cross-entropy: a few units in the last place of about 4
    assert math.isclose(loss(model, inputs, targets).item(), -probability.log().mean().item(), rel_tol=1e-6)


def test_weights_come_from_the_seed_alone_and_the_global_state_stays() -> None:
    config = ModelConfig(preset="gpt2-tiny", **TINY["gpt2-tiny"])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_model(config, TOKENS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = build_model(config, TOKENS, seed=1), build_model(config, TOKENS, seed=2)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_both_attentions_agree() -> None:
    made = [
        build_model(ModelConfig(preset="llama-tiny", attention=kind, **TINY["llama-tiny"]), TOKENS, seed=0)
        for kind in ("sdpa", "eager")
    ]
    inputs = torch.randint(61, (2, 16))
    with torch.no_grad():
        # The same float32 sums in another order.
        torch.testing.assert_close(logits(made[0], inputs), logits(made[1], inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("gpt2-small", 124.4), ("gpt2-medium", 354.8), ("llama-0.5b", 557.8), ("llama-1.1b", 1100.0)],
)
def test_the_papers_models_have_their_sizes(preset: str, millions: float) -> None:
    """With the vocabularies of GPT-2 (50257 ids, 1024 positions) and Llama (32000 ids)."""
    vocabulary, length = (50257, 1024) if preset.startswith("gpt2") else (32000, 2048)
    with torch.device("meta"):
        model = build_model(ModelConfig(preset=preset), Examples(vocabulary, length), seed=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_settings_are_the_presets_with_the_configs_on_top() -> None:
    family, settings = model_settings(ModelConfig(preset="gpt2-tiny", n_layer=7))
    assert family == "gpt2"
    assert settings == {**PRESETS["gpt2-tiny"][1], "n_layer": 7}
    assert PRESETS["gpt2-tiny"][1]["n_layer"] == 4
    assert model_settings(ModelConfig(preset=None, family="llama", hidden_size=8)) == (
        "llama",
        {"hidden_size": 8},
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_head": 3}, "gpt2 cannot be built"),
        ({"n_layer": "two"}, "n_layer"),
        ({"n_positions": 8}, "model.n_positions=8 is shorter than data.seq_len=16"),
        ({"n_layers": 2}, "did you mean `n_layer`"),
    ],
)
def test_settings_that_make_no_model(settings: dict[str, object], words: str) -> None:
    with pytest.raises(LayerwiseError, match=words) as caught:
        build_model(ModelConfig(preset="gpt2-tiny", **settings), TOKENS, seed=0)
    assert "\n" not in str(caught.value)
