"""`check` on transformers' GPT-2 and Llama and on the paper's ResMLP: plain AdamW grows with the width, the rest is flat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.lab.models.paper import ResMLP

transformers = pytest.importorskip("transformers")
SIZES = (32, 64, 128)
WORDS = 40


def words(step: int) -> dict[str, Tensor]:
    found = torch.randint(WORDS, (8, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": found, "labels": found}


def features(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(step))
    return x, x[:, :5].argmax(1)


def at_scale(model: nn.Module) -> nn.Module:
    """Matrices of deviation 1/sqrt(fan_in), as muP and the paper start them: transformers' 0.02 is one width's."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
            fan_in = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
            nn.init.normal_(module.weight, std=fan_in**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model


def gpt2(width: int) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=width, n_layer=2, n_head=width // 16, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return at_scale(transformers.GPT2LMHeadModel(config))


def llama(width: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, max_position_embeddings=16,
    )  # fmt: skip
    return at_scale(transformers.LlamaForCausalLM(config))


def res_mlp(width: int) -> nn.Module:
    return ResMLP(12, 5, width=width // 32, base_width=32)


MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], Any]]] = {
    "GPT-2": (gpt2, words),
    "Llama": (llama, words),
    "ResMLP": (res_mlp, features),
}


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)


def one_over_width(model: nn.Module) -> torch.optim.Optimizer:
    """muP's rule for AdamW: what multiplies a width has its rate divided by it. The first matrix of each model does not."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    wide = [p for name, p in matrices if not any(word in name for word in ("wte", "wpe", "embed", "inp"))]
    ids = {id(p) for p in wide}
    width = wide[-1].shape[1]
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": wide, "lr": 1e-4 * SIZES[0] / width}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0)


METHODS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], str | None]] = {
    "plain": (plain, None),
    "1/width": (one_over_width, None),
    "FLeRM": (plain, "first"),
    "uniform": (lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.0), "uniform"),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_plain_adamw_is_not_flat_in_the_width_and_the_others_are(model):
    make, batch = MODELS[model]
    found = {
        name: lw.check(make, SIZES, build, batch, (1,), match=match, probes=32) for name, (build, match) in METHODS.items()
    }
    assert {name: check.passed for name, check in found.items()} == {
        "plain": False, "1/width": True, "FLeRM": True, "uniform": True,
    }, {name: str(check) for name, check in found.items()}  # fmt: skip
