"""Names, colours and order: optimizers, layers of a network, kinds of tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerwise.common.layer_rate import parameter_of
from layerwise.lab.optimizers.registry import OPTIMIZERS
from layerwise.lab.report import style
from layerwise.lab.report.style import CYCLE, MARKERS, Look

_LOOKS = {
    "adamw": Look(style.GREY, "^"),
    "d-muon": Look(style.BLUE, "s"),
    "scion": Look(style.GREEN, "D"),
    "lanton": Look(style.VERMILLION, "o"),
    "muon": Look(style.SKY, "p"),
    "torch-muon": Look(style.PURPLE, "v"),
    "signum": Look(style.BROWN, "X"),
}


def optimizer_title(name: str) -> str:
    """As tables and figures write it: what it was registered with, or the name that it has in the run."""
    preset = OPTIMIZERS.get(name)
    return name if preset is None else preset.title


def looks(optimizers: Sequence[str]) -> list[Look]:
    """A look for each contender, in order: an optimizer's own, and for its second entry a colour that none has.

    With more contenders than colours two share one, under another marker: 64 looks are told apart.
    """
    reserved = {_LOOKS[name].color for name in optimizers if name in _LOOKS}
    free = [color for color in CYCLE if color not in reserved]
    chosen: list[Look] = []
    for i, name in enumerate(optimizers):
        own = _LOOKS.get(name)
        if own is None or own in chosen:
            color = free.pop(0) if free else CYCLE[i % len(CYCLE)]
            markers = [MARKERS[(i + shift) % len(MARKERS)] for shift in range(len(MARKERS))]
            own = next((look for marker in markers if (look := Look(color, marker)) not in chosen), Look(color))
        chosen.append(own)
    return chosen


@dataclass(frozen=True)
class UnitName:
    """A unit's place in the network: `transformer.h.3.mlp.c_fc.weight` is block `h.3`, part `mlp.c_fc`."""

    unit: str
    block: str  # "h.3", or "" outside the blocks
    part: str  # "mlp.c_fc", "attn.c_attn q", "ln_1 bias"


_PREFIX = re.compile(r"^(_orig_mod\.|module\.|base_model\.|model\.|transformer\.|gpt_neox\.)+")
_BLOCK = re.compile(r"^(?P<block>(?:[A-Za-z_]\w*\.)*?(?P<stack>[A-Za-z_]\w*)\.(?P<index>\d+))\.(?P<part>.+)$")
_UNIT = re.compile(r"^(?P<name>.*?)(?:\[(?P<index>[^\]]*)\])?$")


def unit_name(unit: str) -> UnitName:
    """Parse a unit's name into block and part, without what says nothing (`transformer.`, `.weight`)."""
    match = _UNIT.match(unit)
    name, index = (match["name"], match["index"]) if match else (unit, None)
    name = _PREFIX.sub("", name)
    block = ""
    found = _BLOCK.match(name)
    if found:
        stack = found["block"].split(".")
        block, name = ".".join(stack[-2:]), found["part"]
    name = re.sub(r"\.bias$", " bias", re.sub(r"(\.default)?\.weight$", "", name))
    return UnitName(unit, block, f"{name} {index}" if index else name)


def network_order(units: Iterable[str], parameters: Sequence[str]) -> list[UnitName]:
    """Units from the input of the network to its output: in the order of `parameters`, which is the model's."""
    rank = {name: number for number, name in enumerate(parameters)}
    return [unit_name(unit) for unit in sorted(units, key=lambda unit: rank.get(parameter_of(unit), len(rank)))]
