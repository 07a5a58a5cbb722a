"""Which base tensor each tensor of a deeper model takes its rate from: the depth map, as data.

With depth multiplied by m, base block b becomes target blocks m*b .. m*b+m-1, and each copy of each tensor gets 1/m of the
base tensor's rate (arXiv 2502.17405). Tensors outside the stack keep theirs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from layerwise.common.parameter_names import canonical_name, canonical_names, first_few, unwrap
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.runners import trainable

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

    Args:
        names: of the model's parameters.
        base: of the base's, or `None` in uniform mode, which has no base model.
        depth: the block stacks.

    Raises:
        LayerwiseError: a pattern that fits nothing, depths that are no multiples, a tensor without a base.
    """
    short = canonical_names(names)
    base_names = None if base is None else {canon: name for name, canon in canonical_names(base).items()}
    stacks = {canonical_name(pattern): rule for pattern, rule in depth.items()}
    result = {}
    for name, source in zip(names, _sources(list(short.values()), base_names, stacks).values(), strict=True):
        result[name] = source if base_names is None else replace(source, name=base_names[source.name])
    return result


def _sources(names: Collection[str], base: Collection[str] | None, depth: DepthMap) -> dict[str, Source]:
    """The same by canonical names."""
    found = {name: Source(name, 1) for name in names}
    for pattern, rule in depth.items():
        matcher = _matcher(pattern, rule)
        blocks = _blocks(names, matcher, pattern, "the model")
        base_blocks = blocks
        if base is not None:
            base_blocks = _blocks(base, matcher, pattern, "the base")
        if isinstance(rule, int):
            if base is not None and rule != base_blocks:
                raise LayerwiseError(f"depth[{pattern!r}] says {rule} base blocks, the base has {base_blocks}")
            base_blocks = rule
        if base_blocks < 1 or blocks % base_blocks:
            raise LayerwiseError(
                f"depth[{pattern!r}]: the model has {blocks} blocks, the base {base_blocks}: make the model's depth a "
                "multiple of the base's"
            )
        times = blocks // base_blocks
        for name in names:
            match = matcher.fullmatch(name)
            if match:
                source = f"{name[: match.start(1)]}{int(match[1]) // times}{name[match.end(1) :]}"
                found[name] = Source(source, 1 if rule == "copy" else times)
    if base is not None:
        _check_all_known(found, base)
    return found


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
