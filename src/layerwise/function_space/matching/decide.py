"""One matching: which base tensor each tensor takes its rate from, what its multiplier then is, and what was decided."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from layerwise.common.parameter_names import canonical_name, canonical_names, first_few, unwrap
from layerwise.common.text_table import aligned, folded
from layerwise.errors import LayerwiseError, warn
from layerwise.function_space.measuring.runners import trainable
from layerwise.function_space.rates import Rate

#: The most that a rate may be multiplied or divided by.
Factor = Annotated[float, "a number from 1 on", lambda factor: factor >= 1]
#: Of all rates' root sum of squares.
Part = Annotated[float, "a number from 0 to 1", lambda part: 0 <= part <= 1]
#: The note of a parameter whose rate the user keeps.
FIXED = "fixed"
_HIDDEN = "kept: its update does not reach the outputs"
#: A rate that is raised by more than that is told: it is next to 0 that was measured.
_MUCH = 100


@dataclass(frozen=True)
class Matched:
    """One parameter at one matching.

    Attributes:
        measured: its function-space rate in the step as the optimizer took it.
        target: what it should be.
        change: the factor that its update and its learning rate were multiplied by (1 where it was left alone).
        lr: its learning rate afterwards.
        note: why it was left alone, or what its change was before `max_change` bounded it.
    """

    measured: float
    target: float
    change: float
    lr: float
    note: str


@dataclass(frozen=True)
class MatchReport:
    """What a matching did; `str()` is a table."""

    step: int
    rows: Mapping[str, Matched]

    @property
    def left_alone(self) -> dict[str, str]:
        """Parameters that keep their learning rate, and why."""
        return {name: row.note for name, row in self.rows.items() if row.note and not row.note.startswith("clamped")}

    def warn_of_odd(self, who: str, where: str) -> None:
        """Say which rates stay as they were although nobody asked for that, and which are raised very much."""
        kept = [name for name, note in self.left_alone.items() if note != FIXED]
        hidden = sum(row.note == _HIDDEN for row in self.rows.values())
        early = "; before a layer that starts at 0 there is nothing to match yet: match later (at=5)"
        why = early if 2 * hidden >= len(self.rows) else ""
        if kept:
            warn(f"{who} left {len(kept)} learning rates as they were ({first_few(kept, 4)}): see {where}{why}")
        raised = [name for name, row in self.rows.items() if row.change > _MUCH]
        if raised:
            told = f"{who} raised {len(raised)} learning rates more than {_MUCH} times ({first_few(raised, 4)}): see {where}"
            warn(f"{told}; their steps do next to nothing yet: match later (at=5), or bound it (max_change=10)")

    def __str__(self) -> str:
        """The table; of more than 40 parameters those of blocks that are alike share a line."""
        titles, *rows = self._cells()
        return self._text([titles, *folded(rows)])

    def table(self) -> str:
        """A line a parameter, in the order of the model."""
        return self._text(self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        """The titles, and a row a parameter."""
        cells: list[tuple[str, ...]] = [("parameter", "measured", "target", "change", "lr", "")]
        for name, row in self.rows.items():
            cells.append((name, *(f"{x:.4g}" for x in (row.measured, row.target, row.change, row.lr)), row.note))
        return cells

    def _text(self, cells: Sequence[tuple[str, ...]]) -> str:
        return "\n".join([f"matched at step {self.step}", *aligned(cells, right=range(1, 5))])


def fixed_parameters(parameters: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, str]:
    """The parameters that fit a pattern, each with the note that a report has for it.

    Raises:
        LayerwiseError: a pattern that fits none.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise LayerwiseError(f"fixed pattern {pattern!r} fits no parameter")
        found |= dict.fromkeys(names, FIXED)
    return found


def noise_floor(measured: Mapping[str, float], relative: float) -> float:
    """The rate under which a value is taken for rounding noise: `relative` times the root sum of squares of all."""
    return relative * math.hypot(*(value for value in measured.values() if math.isfinite(value)))


def rounding_noise(dtypes: Iterable[torch.dtype]) -> float:
    """What is left of a rate that is truly 0 (a key bias), as a part of all rates' root sum of squares.

    Measured on attention under sign updates: up to 0.16 of float32's rounding and 0.02 of bfloat16's, whose kernels work in
    float32 inside. These are three times that.
    """
    return max(torch.finfo(dtype).eps * (0.5 if torch.finfo(dtype).bits >= 32 else 0.06) for dtype in dtypes)


def decide(
    measured: Mapping[str, float],
    targets: Mapping[str, float],
    negligible: Mapping[str, str],
    relative: float,
    max_change: float | None,
) -> dict[str, tuple[float, str]]:
    """The change of each parameter's rate, and a note where it is not simply target / measured.

    A rate of 0 or of rounding noise says nothing about the step that is right: such a parameter keeps its rate. A key bias
    is the usual one: it adds the same to all scores of a query, which the softmax takes out again.

    Args:
        measured: rates of the step as it was taken.
        targets: what they should be.
        negligible: parameters that keep their rate for another reason, which it says.
        relative: what counts as rounding noise, see `noise_floor`.
        max_change: bound of a change, up or down.
    """
    floor = noise_floor(measured, relative)
    decided = {}
    for name, value in measured.items():
        change, note = 1.0, negligible.get(name, "")
        if note:
            pass
        elif not math.isfinite(value):
            note = "kept: its measured rate is not finite"
        elif value == 0:
            note = _HIDDEN
        elif value <= floor:
            note = f"kept: its measured rate is rounding noise (below {floor:.2g})"
        else:
            change, note = _bounded(targets[name] / value, max_change)
        decided[name] = (change, note)
    return decided


def corrected(
    decided: Mapping[str, tuple[float, str]],
    measured: Mapping[str, Rate],
    targets: Mapping[str, float],
    max_change: float | None,
) -> dict[str, tuple[float, str]]:
    """The changes after one more look at what the redone step does: a whole update does not follow its rate.

    Args:
        decided: changes and notes so far; those with a note are left as they are.
        measured: differences of the step as it was redone.
        targets: what they should be.
        max_change: bound of a change in all, up or down.
    """
    found = dict(decided)
    for name, (change, note) in decided.items():
        rate = measured[name]
        if not note and rate.value > 3 * rate.stderr:
            found[name] = _bounded(change * targets[name] / rate.value, max_change)
    return found


def _bounded(change: float, most: float | None) -> tuple[float, str]:
    """A change within its bound, and a note where it was not."""
    if most is None or 1 / most <= change <= most:
        return change, ""
    return min(max(change, 1 / most), most), f"clamped from {change:.3g}"


#: Pattern of a block stack (`"transformer.h.*"`, the star is the block's number) -> `"split"`, `"copy"`, or the number of
#: blocks that the base model has (then split).
DepthMap = Mapping[str, "str | int"]


@dataclass(frozen=True)
class Source:
    """The base tensor and the number of target tensors that share its rate."""

    name: str
    share: int


def infer_depth(model: nn.Module) -> dict[str, str | int]:
    """The block stacks of a transformers model: lists of `config.num_hidden_layers` modules with parameters."""
    model = unwrap(model)
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    names = list(trainable(model))
    found: dict[str, str | int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and any(n.startswith(f"{name}.") for n in names):
            found[f"{name}.*"] = "split"
    return found


def sources(names: Collection[str], base: Collection[str] | None, depth: DepthMap) -> dict[str, Source]:
    """Map every target name to its base tensor, whatever blocks of either model are wrapped in.

    With depth multiplied by m, base block b becomes target blocks m*b .. m*b+m-1, and each copy of each tensor gets 1/m of
    the base tensor's rate (arXiv 2502.17405). Tensors outside the stack keep theirs.

    Args:
        names: of the model's parameters.
        base: of the base's, or `None` in uniform mode, which has no base model.
        depth: the block stacks.

    Raises:
        LayerwiseError: a pattern that fits nothing, depths that are no multiples, a tensor without a base.
    """
    short = canonical_names(names)
    known = None if base is None else {canon: name for name, canon in canonical_names(base).items()}
    found = {name: Source(name, 1) for name in short.values()}
    for pattern, rule in ((canonical_name(pattern), rule) for pattern, rule in depth.items()):
        matcher = _matcher(pattern, rule)
        blocks = _blocks(found, matcher, pattern, "the model")
        base_blocks = blocks if known is None else _blocks(known, matcher, pattern, "the base")
        if isinstance(rule, int):
            if known is not None and rule != base_blocks:
                raise LayerwiseError(f"depth[{pattern!r}] says {rule} base blocks, the base has {base_blocks}")
            base_blocks = rule
        if base_blocks < 1 or blocks % base_blocks:
            raise LayerwiseError(
                f"depth[{pattern!r}]: the model has {blocks} blocks, the base {base_blocks}: make the model's depth a "
                "multiple of the base's"
            )
        times = blocks // base_blocks
        for name in found:
            match = matcher.fullmatch(name)
            if match:
                source = f"{name[: match.start(1)]}{int(match[1]) // times}{name[match.end(1) :]}"
                found[name] = Source(source, 1 if rule == "copy" else times)
    if known is None:
        return {name: found[canon] for name, canon in short.items()}
    _check_all_known(found, known)
    return {name: replace(found[canon], name=known[found[canon].name]) for name, canon in short.items()}


def _matcher(pattern: str, rule: str | int) -> re.Pattern[str]:
    before, star, after = pattern.partition("*")
    if not star or "*" in after:
        raise LayerwiseError(f"depth pattern {pattern!r}: write one * in the place of the block's number")
    if isinstance(rule, bool) or (isinstance(rule, str) and rule not in ("split", "copy")):
        raise LayerwiseError(f"depth[{pattern!r}] is {rule!r}: use 'split', 'copy' or the base's number of blocks")
    return re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}(?:\..*)?")


def _blocks(names: Collection[str], matcher: re.Pattern[str], pattern: str, whose: str) -> int:
    indices = {int(match[1]) for match in map(matcher.fullmatch, names) if match}
    if not indices:
        raise LayerwiseError(f"depth pattern {pattern!r} fits no parameter of {whose}")
    return max(indices) + 1


def _check_all_known(found: Mapping[str, Source], base: Collection[str]) -> None:
    missing = [name for name, source in found.items() if source.name not in base]
    if not missing:
        return
    stacks = {
        f"{missing[0][: match.start()]}.*": "split"
        for match in re.finditer(r"\.\d+(?=\.)", missing[0])
        if f"{missing[0][: match.start()]}.0{missing[0][match.end() :]}" in base
    }
    remedy = f"pass depth={stacks}" if stacks else "record the base with a model of the same parameter names"
    shown = first_few(map(repr, missing))
    raise LayerwiseError(f"the base has no rate for {len(missing)} parameters ({shown}): {remedy}")
