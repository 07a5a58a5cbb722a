"""Fixed rates by depth and width: factors by parameter name, for any optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import nn

from layerwise.common.alike_names import siblings_of
from layerwise.common.checked import checked
from layerwise.errors import LayerwiseError
from layerwise.geometry.depth import distances
from layerwise.geometry.describe import Row, describe
from layerwise.geometry.forward import Forward

#: Of roles whose rate under Adam goes with one over their inputs, in muP.
_BY_INPUTS = ("head", "hidden", "conv", "experts")
#: What a group of `param_groups` has for optimizers of ours alone.
_OURS = ("params", "role", "layout", "geometry", "norm_group", "origin", "lr_scale")
Rate = Annotated[float, "a number from 0 on", lambda number: number >= 0]
Groups = Annotated[Sequence[Mapping[str, Any]], "the groups that lw.param_groups(model, batch) returned"]
Decay = Annotated[float, "a number above 0 and at most 1", lambda number: 0 < number <= 1]


@checked
def layer_decay(model: nn.Module, decay: Decay, batch: Any = None, forward: Forward | None = None) -> dict[str, float]:
    """Layer-wise learning-rate decay, for fine-tuning: `decay` to the power of a parameter's distance from the outputs.

    The head has factor 1, the last block `decay`, the one before it its square, and embeddings one power more than the
    first block (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254; 0.65 to 0.9 are usual). What is a block, and what comes
    after what, is seen when the model runs once, as for `param_groups`: also in stages (Swin, ResNet), and in towers side by
    side, each with a top of its own. A tied embedding counts as an embedding.

    Args:
        model: the model, not sharded yet.
        decay: from one block to the one before it.
        batch: what the model takes, as for `param_groups`; a model of transformers gets a small batch made for it.
        forward: `forward(model, batch)` runs the model, where a plain call does not.

    Returns:
        Name of each parameter, frozen ones too -> its factor: `factors=` of `param_groups`.

    Raises:
        LayerwiseError: no batch for a model that needs one, a model that does not run on it, whose blocks run by other
            methods than forward, or that FSDP2 has sharded.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.randn(3, 4)
        >>> factors = lw.layer_decay(model, 0.5, batch)
        >>> factors["4.weight"], factors["2.weight"], factors["0.weight"]
        (1.0, 0.5, 0.25)
        >>> groups = lw.param_groups(model, batch, factors=factors)
        >>> optimizer = torch.optim.AdamW(lw.torch_groups(groups, lr=1e-3))
        >>> sorted({group["lr"] for group in optimizer.param_groups})
        [0.00025, 0.0005, 0.001]
    """
    return {name: float(decay**distance) for name, distance in distances(model, batch, forward).items()}


@checked
def width_factors(model: nn.Module, base: nn.Module, batch: Any = None, forward: Forward | None = None) -> dict[str, float]:
    """muP's rates for Adam: matrices at the rate of a narrower model times the ratio of their inputs (arXiv 2203.03466).

    A matrix inside of the network or a head (a tied embedding too) whose inputs are `w` times as many as in `base` gets
    `1 / w`; embeddings, gains, biases and LoRA's factors get 1. It carries a rate that was tuned on `base` to `model`, for
    Adam's steps: those of `Muon` and its like have a size of their own. Weights stay as they were initialised; in muP
    deviations go with `1 / sqrt(w)`, the head's with `1 / w`.

    Args:
        model: the model to train.
        base: the small one whose rate was tuned, on any device, with the same names; further blocks take the factors of
            those that are alike.
        batch: what both take; see `param_groups`.
        forward: `forward(model, batch)` runs either, where a plain call does not.

    Returns:
        Name of each trainable parameter -> its factor: `factors=` of `param_groups`.

    Raises:
        LayerwiseError: a parameter that has no counterpart in `base`.

    Examples:
        >>> def make(width):
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        >>> lw.width_factors(make(64), make(16), torch.randn(3, 4))["2.weight"]
        0.25
    """
    rows = describe(base, batch, forward=forward).rows
    known = {(_in_any_block(row.name), row.role): row for row in rows} | {(row.name, row.role): row for row in rows}
    factors = {}
    for row in describe(model, batch, forward=forward).rows:
        other = known.get((row.name, row.role)) or known.get((_in_any_block(row.name), row.role))
        if other is None:
            raise LayerwiseError(f"base has no {row.role} {row.name!r}: give the same model, of a smaller width")
        factors[row.name] = _inputs(other) / _inputs(row) if row.role in _BY_INPUTS else 1.0
    return factors


def _in_any_block(name: str) -> str:
    """The name without the numbers of blocks; of layers in one flat list, whose numbers are all they differ in, as it is."""
    pattern = siblings_of(name)
    return name if pattern.split(".")[-2:-1] == ["*"] else pattern


def _inputs(row: Row) -> int:
    """d_in of its largest matrix."""
    return max(d_in for _, _, d_in in row.layout.shapes(row.shape))


@checked
def torch_groups(groups: Groups, lr: Rate) -> list[dict[str, Any]]:
    """Groups of `param_groups` as any optimizer takes them: with rates of their own, and nothing that is for ours.

    Args:
        groups: of `lw.param_groups`, with what overrides and `factors` gave them.
        lr: the base rate; a group's is this, or its own `lr`, times its `lr_scale`.

    Raises:
        LayerwiseError: groups that are not of `param_groups`.

    Returns:
        Groups `{"params": [parameter, ...], "lr": float, **options}`, those that share everything in one. `weight_decay` is
        in those that `param_groups` gave one: 0 for gains, biases and tables of positions.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> by_role = {"role:embedding": {"lr_scale": 16.0}, "role:head": {"lr_scale": 8.0}}
        >>> groups = lw.param_groups(model, torch.arange(6), overrides=by_role)
        >>> optimizer = torch.optim.AdamW(lw.torch_groups(groups, lr=2e-3), weight_decay=0.1)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.032, 0.1), (0.002, 0.1), (0.002, 0.0), (0.016, 0.1)]
    """
    plain: dict[str, dict[str, Any]] = {}
    for group in groups:
        if "role" not in group:
            raise LayerwiseError(f"a group of {', '.join(group)} is none of lw.param_groups: give those, as they came")
        own = {key: value for key, value in group.items() if key not in _OURS}
        own["lr"] = float(own.get("lr", lr)) * float(group.get("lr_scale", 1.0))
        shared = plain.setdefault(repr(sorted(own.items())), {"params": [], **own})
        shared["params"] += [p for _, p in group["params"]]
    return list(plain.values())
