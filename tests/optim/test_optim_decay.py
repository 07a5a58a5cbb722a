"""What is decayed by default: what every training script decays, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import layerwise as lw


class Tokens(nn.Module):
    """A vision transformer's beginning and end: patches, a class token, registers, positions; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(12, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = [self.cls_token.expand(len(x), -1, -1), self.register_tokens.expand(len(x), -1, -1)]
        x = torch.cat([*first, self.patches(x)], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class Named(nn.Module):
    """A table that only the model's own list tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_table = nn.Embedding(6, 4)
        self.words = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def no_weight_decay(self) -> set[str]:
        return {"bias_table.weight"}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.words(x) + self.bias_table(x))
        return logits


class Counted(nn.Module):
    """Words, kinds of words, and places in a table each; a table of places that is added as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.places, self.shifted, self.kept, self.whole = (nn.Embedding(9, 4) for _ in range(4))
        self.both, self.apart, self.mapped = (nn.Embedding(9, 4) for _ in range(3))
        self.bag = nn.EmbeddingBag(9, 4)
        self.register_buffer("numbers", torch.arange(9).expand(1, -1), persistent=False)
        self.register_buffer("zeros", torch.zeros(1, 9, dtype=torch.long))
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        long = ids.shape[1]
        counted = torch.arange(long, device=ids.device)
        x = self.words(ids) + self.kinds(self.zeros.gather(1, self.numbers)[:, :long]) + self.whole.weight[:long]
        x = x + self.places(counted) + self.shifted(counted.unsqueeze(0).expand(len(ids), -1) + 2)
        x = x + self.kept(self.numbers[:, :long]) + self.both(counted) + self.both(ids)
        x = x + self.apart((counted[:, None] - counted).abs().clamp(max=5)).mean(1)  # relative positions
        x = x + self.mapped(self.numbers[0][ids]) + self.bag(ids.reshape(-1, 1)).view_as(x)
        logits: Tensor = self.head(x)
        return logits


def decayed(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the parameters that a step with zero gradients moves: those that the decay reaches."""
    before = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            p.data.fill_(1.0)
            p.grad = torch.zeros_like(p)
            before[name] = p
    optimizer.step()
    return {name for name, p in before.items() if not torch.equal(p, torch.ones_like(p))}


@pytest.mark.parametrize("batch", [None, torch.randn(2, 6, 12)], ids=["by module", "by forward"])
@pytest.mark.filterwarnings("ignore:the roles of")
def test_gains_biases_positions_and_tokens_are_not_decayed(batch: Tensor | None) -> None:
    model = Tokens()
    optimizer = lw.DMuon(lw.param_groups(model, batch), lr=0.1, weight_decay=0.5)
    assert decayed(optimizer) == {"patches.weight", "head.weight"}


def test_what_the_model_itself_names_is_not_decayed_through_wrappers_too() -> None:
    optimizer = lw.DMuon(lw.param_groups(torch.compile(Named(), backend="eager")), lr=0.1, weight_decay=0.5)
    assert decayed(optimizer) == {"words.weight", "head.weight"}


def test_tables_that_are_read_by_position_are_not_decayed() -> None:
    """Whatever they are called; a batch that counts up itself makes no table one of positions."""
    groups = lw.param_groups(Counted(), torch.arange(6).expand(2, -1))
    optimizer = lw.DMuon(groups, lr=0.1, weight_decay=0.5)
    assert decayed(optimizer) == {f"{name}.weight" for name in ("words", "kinds", "both", "mapped", "bag", "head")}


def test_positions_are_known_on_the_meta_device_too() -> None:
    config = GPT2Config(vocab_size=32, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    with torch.device("meta"):
        on_meta = GPT2LMHeadModel(config)
    for model in (on_meta, GPT2LMHeadModel(config)):
        undecayed = {n for g in lw.param_groups(model) if g.get("weight_decay") == 0 for n, _ in g["params"]}
        assert "transformer.wpe.weight" in undecayed
        assert "transformer.wte.weight" not in undecayed


def test_an_override_decays_them() -> None:
    groups = lw.param_groups(Named(), overrides={"role:vector": {"weight_decay": 0.1}})
    assert decayed(lw.DMuon(groups, lr=0.1)) == {"words.weight", "head.weight", "head.bias"}


def test_a_role_given_by_the_user_is_decayed_as_that_role_is() -> None:
    model = Tokens()
    overrides = {
        "pos_embed": {"role": "experts", "layout": lw.StackLayout()},
        "norm.weight": {"role": "vector"},
    }
    with pytest.warns(UserWarning, match="roles"):
        groups = lw.param_groups(model, overrides=overrides)
    assert decayed(lw.DMuon(groups, lr=0.1, weight_decay=0.5)) == {
        "patches.weight",
        "head.weight",
        "pos_embed",
    }


def test_adamw_of_torch_reads_the_same_groups() -> None:
    optimizer = torch.optim.AdamW(lw.param_groups(Named()), lr=0.1, weight_decay=0.5)
    assert decayed(optimizer) == {"words.weight", "head.weight"}


def test_vectors_given_by_shape_alone_are_not_decayed() -> None:
    with pytest.warns(UserWarning, match="shape alone"):
        optimizer = lw.DMuon(nn.Linear(3, 2).named_parameters(), lr=0.1, weight_decay=0.5)
    assert decayed(optimizer) == {"weight"}


def test_a_checkpoint_keeps_the_decay_it_was_saved_with() -> None:
    old = lw.DMuon(lw.param_groups(Named(), overrides={"role:vector": {"weight_decay": 0.1}}), lr=0.1)
    new = lw.DMuon(lw.param_groups(Named()), lr=0.1)
    new.load_state_dict(old.state_dict())
    assert "head.bias" in decayed(new)
