"""What a parameter is, by what its module says and by what was seen of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count

import torch
from torch import Size, Tensor

from layerwise.geometry.axes import table_layout
from layerwise.geometry.forward.evidence import Evidence, Kind, Use
from layerwise.geometry.forward.parts import channels_split, layout_seen
from layerwise.geometry.found import Found
from layerwise.geometry.layout import Layout, VectorLayout, VectorStackLayout, conv_layout

#: Above this many entries two layouts are compared by the shapes of their matrices alone.
_COMPARED = 2**22
_FLAT = "multiplies as a matrix, but is stored flat: all of it is one vector; store it with two dimensions"
_GUESSED = "multiplied with another parameter: a guess which is a table of inputs, and which maps it"


def judged(found: Found, evidence: Evidence, number: int) -> Found:
    """A parameter as its modules have it, put right by what the forward pass showed."""
    seen = _seen(found, evidence, number)
    return replace(seen, note=_GUESSED) if found.assumed and number in evidence.guessed else seen


def _seen(found: Found, evidence: Evidence, number: int) -> Found:
    uses = evidence.uses.get(number, [])
    kinds = {use.kind for use in uses}
    if not uses:
        return replace(found, note=evidence.of_unseen or found.note)
    is_output = number in evidence.reached and number not in evidence.transformed
    if "product" in kinds:
        return _matrix(found, evidence, number, is_output)
    if "convolution" in kinds:
        return _convolution(found, evidence, number, is_output)
    if "other" in kinds and "lookup" not in kinds and (found.role == "head" or (is_output and found.role == "hidden")):
        # The weight of a layer, made or used in a way that was not followed.
        return replace(found, role="head")
    if "lookup" in kinds and found.parameter.ndim in (2, 3) and _may_be_a_table(found, kinds):
        kept = found.role in ("embedding", "lora_A", "lora_B")
        layout = found.layout if kept else table_layout(found.parameter.ndim)
        role = found.role if found.is_factor else "embedding"
        positions = role == "embedding" and all(use.counted for use in uses if use.kind == "lookup")
        known = replace(found, role=role, layout=layout, note="", how="forward")
        return replace(known, undecayed=found.undecayed or positions)
    if found.assumed and kinds != {"other"}:
        return _entry_by_entry(found, uses)
    agree = found.role in ("vector", "embedding") and kinds != {"other"}
    added = found.role == "embedding" and kinds <= {"bias", "table"}  # read as a whole: positions
    note = "" if kinds <= {"gain", "bias", "norm"} else found.note
    return replace(found, how="forward", note=note, undecayed=found.undecayed or added) if agree else found


def _may_be_a_table(found: Found, kinds: set[Kind]) -> bool:
    """Whether rows that are read by number may be all there is; of a layer, something else may be done with them."""
    if found.role in ("hidden", "head") and "other" in kinds:
        return found.assumed
    return found.assumed or found.role != "vector"


def _matrix(found: Found, evidence: Evidence, number: int, is_output: bool) -> Found:
    uses, shape = evidence.uses[number], found.parameter.shape
    seen = layout_seen(uses, evidence.sites.get(number, []), shape, evidence.apart.get(number, set()))
    if found.parameter.ndim == 1 and any({"out", "in"} <= {axis.side for axis in use.axes} for use in uses):
        return replace(found, note=_FLAT)
    if seen is None or found.parameter.ndim < 2:
        return replace(found, role="head") if is_output and found.role == "hidden" else found
    looked_up = any(use.kind == "lookup" for use in uses)
    if looked_up and found.role == "embedding" and not is_output:  # a codebook, compared with and read
        return replace(found, note="", how="forward", undecayed=found.undecayed and not found.assumed)
    layout = seen.layout if seen.parts else _with_known_parts(seen.layout, found.layout, shape)
    if is_output or found.role == "head":
        layout = replace(layout, split=None)
    if not found.assumed and alike(found.layout, layout, shape):
        layout = found.layout  # the same units, under the names its module has for them
    role = _role(found, layout, uses, is_output)
    unsure = found.note and not (seen.parts or found.assumed or role != "hidden")
    note = found.note if unsure else seen.note
    return replace(found, role=role, layout=layout, kernel=(), note=note, how="forward")


def _role(found: Found, layout: Layout, uses: Sequence[Use], is_output: bool) -> str:
    if found.is_factor:
        return found.role
    if is_output or found.role == "head":
        return "head"
    stacked = found.assumed or any(axis.side == "stack" for use in uses for axis in use.axes)
    if stacked and layout.stack_shape(found.parameter.shape)[0] > 1:
        return "experts"
    return "hidden" if found.assumed or found.role != "experts" else "experts"  # slices of a layer are its parts


def _with_known_parts(seen: Layout, known: Layout, shape: Size) -> Layout:
    """The parts that the module knows, where the forward pass showed none of its own."""
    try:
        same = known.stack_shape(tuple(shape)) == seen.stack_shape(tuple(shape))
    except ValueError:
        return seen
    return replace(seen, split=known.split) if same else seen


def _convolution(found: Found, evidence: Evidence, number: int, is_output: bool) -> Found:
    use = next(use for use in evidence.uses[number] if use.kind == "convolution")
    role = found.role if found.is_factor else "head" if is_output else "conv"
    if len(use.shape) != found.parameter.ndim or found.is_factor:
        return replace(found, role=role, how="forward")
    layout, channels = conv_layout(found.parameter.shape, use.groups, use.transposed), found.parameter.shape[0]
    if use.groups == 1 and role == "conv" and not use.transposed:
        stride = found.parameter.shape[1:].numel()
        layout = replace(layout, split=channels_split(channels, stride, evidence.sites.get(number, [])))
    return replace(found, role=role, layout=layout, kernel=use.kernel, note="", how="forward")


def _entry_by_entry(found: Found, uses: Sequence[Use]) -> Found:
    """A parameter that is only added to or multiplied with activations: a table of positions, or gains and biases."""
    wide = max(sum(size > 1 for size in use.shape) for use in uses)
    dimensions = found.parameter.ndim
    tables = ("bias", "table", "norm") if found.role == "embedding" else ("bias", "table")
    is_table = found.role != "vector" and any(use.kind in tables for use in uses)
    if wide > 1 and is_table:
        layout = table_layout(dimensions)
        return replace(found, role="embedding", layout=layout, note="", how="forward", undecayed=True)
    stacked = wide <= 1 and dimensions == 2 and min(found.parameter.shape) > 1
    layout = VectorStackLayout() if stacked else VectorLayout()
    return replace(found, role="vector", layout=layout, note="", how="forward")


@lru_cache(maxsize=64)
def alike(one: Layout, other: Layout, shape: Size) -> bool:
    """Whether two layouts make the same units of a tensor, whatever they call them."""
    if one == other:
        return True
    try:
        shapes = [layout.shapes(tuple(shape)) for layout in (one, other)]
    except ValueError:
        return False
    sizes = [sorted((d_out, d_in) for k, d_out, d_in in stacks for _ in range(k)) for stacks in shapes]
    if sizes[0] != sizes[1]:
        return False
    if shape.numel() > _COMPARED:
        return True
    pairs = _units(one, shape) * len(sizes[0]) + _units(other, shape)
    return len(torch.unique(pairs)) == len(sizes[0])


def _units(layout: Layout, shape: Size) -> Tensor:
    """For every entry the number of its unit."""
    number = count()
    stacks = [
        torch.stack([torch.full((d_out, d_in), next(number), device="cpu") for _ in range(k)])
        for k, d_out, d_in in layout.shapes(tuple(shape))
    ]
    return layout.from_matrices(stacks, tuple(shape))
