"""What a user declares of parameters: how they divide, and options, roles and geometries by pattern."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any

from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError
from layerwise.geometry.axes import layout_of
from layerwise.geometry.found import MATRIX_ROLES, ROLES, Found
from layerwise.geometry.layout import DepthwiseLayout, Layout, MatrixLayout, Shape, TransposedLayout, VectorLayout
from layerwise.geometry.norms import Geometry, RowNorm, Sign, VectorRMS
from layerwise.geometry.spectral.spectral import Spectral, spectral_conv
from layerwise.geometry.split import Split

Override = Geometry | Mapping[str, Any]
#: Several of them stand one after the other, and the later one wins.
Overrides = Mapping[str, Override] | Sequence[Mapping[str, Override]]
SplitSpec = int | str | Mapping[str, Any] | Split
_SPLITS = (
    "a number of equal parts, a dict of sizes, a Split or a dict of its fields, or a pattern such as 'o (4 i)', which "
    "divides d_in"
)
#: By a pattern on the parameter's name.
Splits = Annotated[Mapping[str, SplitSpec], _SPLITS]


@dataclass(frozen=True)
class Assigned:
    """A trainable parameter with its geometry and the options that overrides gave it."""

    found: Found
    geometry: Geometry
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def norm_group(self) -> str:
        """Units of one norm group have their noise compared: the geometry's family unless overridden."""
        return str(self.options.get("norm_group") or self.geometry.norm_group)


def default_geometry(role: str, kernel: tuple[int, ...] = (), layout: Layout | None = None) -> Geometry:
    """The geometry a role gets when nothing else is said (Scion's choice, arXiv 2502.07529, table 4).

    A depthwise convolution maps each channel to itself: a norm for each row, and not one of the matrix of all filters.
    """
    if isinstance(layout, DepthwiseLayout):
        return RowNorm()
    if role in MATRIX_ROLES:
        return spectral_conv(kernel) if kernel else Spectral()
    return {"embedding": Sign(), "head": Sign(per_input=True), "vector": VectorRMS()}[role]


def matched(argument: str, patterns: Mapping[str, Any], names: list[tuple[str, ...]], frozen: list[str]) -> dict[str, Any]:
    """First name of each parameter that a pattern matches -> the pattern's value."""
    matched_by: dict[str, str] = {}
    for pattern in patterns:
        hits = [own[0] for own in names if any(fnmatchcase(name, pattern) for name in own)]
        if not hits and any(fnmatchcase(name, pattern) for name in frozen):
            raise LayerwiseError(f"{argument}: {pattern!r} matches frozen parameters only; drop it or unfreeze them")
        if not hits:
            raise LayerwiseError(f"{argument}: {pattern!r} matches no parameter{_nearest(pattern, names)}")
        for name in hits:
            if name in matched_by:
                raise LayerwiseError(
                    f"{argument}: {name} is matched by {matched_by[name]!r} and by {pattern!r}; "
                    "a parameter takes one pattern, so make them disjoint"
                )
            matched_by[name] = pattern
    return {name: patterns[pattern] for name, pattern in matched_by.items()}


def options_by_name(
    overrides: Overrides, trainable: list[Found], names: list[tuple[str, ...]], frozen: list[str]
) -> dict[str, dict[str, Any]]:
    """First name of each parameter that something overrides -> its options: by role, then by name, then the next dict."""
    merged: dict[str, dict[str, Any]] = defaultdict(dict)
    for layer in [overrides] if isinstance(overrides, Mapping) else overrides:
        by_role = {key.removeprefix("role:"): value for key, value in layer.items() if key.startswith("role:")}
        for role in by_role:
            _check_role(role, "'role:...'")
        for found in trainable:
            if found.role in by_role:
                merged[found.name] |= _as_options(found.name, by_role[found.role])
        by_name = {key: value for key, value in layer.items() if not key.startswith("role:")}
        for name, value in matched("overrides", by_name, names, frozen).items():
            merged[name] |= _as_options(name, value)
    return merged


def _as_options(name: str, value: Override) -> dict[str, Any]:
    if not isinstance(value, (Geometry, Mapping)):
        raise LayerwiseError(f"overrides: {name} has {value!r}; give a geometry or a dict of options")
    return {"geometry": value} if isinstance(value, Geometry) else dict(value)


def _check_role(role: str, of: str) -> None:
    if role not in ROLES:
        near = nearest(str(role), ROLES)
        raise LayerwiseError(
            f"overrides: role {role!r} of {of} is unknown; "
            + (f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(ROLES)}")
        )


def _nearest(pattern: str, names: list[tuple[str, ...]]) -> str:
    every = [name for own in names for name in own]
    bare = pattern.replace("*", "").replace("?", "").strip(".")
    # compare with the end of each name that is as long: "*.c_attn.wieght" finds "h.0.attn.c_attn.weight"
    depth = bare.count(".") + 1
    ends: dict[str, str] = {}
    for name in every:
        ends.setdefault(".".join(name.split(".")[-depth:]), name)
    near = nearest(bare, ends, count=3)
    if near:
        return "; nearest: " + ", ".join(ends[end] for end in near)
    return f"; names look like {every[0]}"


def split_layout(found: Found, spec: SplitSpec) -> Layout:
    """The layout of a parameter that divides as the user says. Raises LayerwiseError where it cannot."""
    shape = tuple(found.parameter.shape)
    whole = replace(found.layout, split=None)
    try:
        layout = layout_of(spec) if isinstance(spec, str) else replace(whole, split=_split_of(spec, whole, shape))
        layout.shapes(shape)
    except LayerwiseError as error:
        hint = f"; give {_SPLITS}" if isinstance(spec, str) else ""
        raise LayerwiseError(f"splits: {found.name}: {error}{hint}") from None
    return layout


def _split_of(spec: SplitSpec, whole: Layout, shape: Shape) -> Split | None:
    """None where all is one part."""
    if isinstance(spec, Split):
        return spec
    if isinstance(spec, int) and not isinstance(spec, bool) and spec >= 1:
        return Split.equal(*map(str, range(spec))) if spec > 1 else None
    if not isinstance(spec, Mapping):
        raise LayerwiseError(f"it has {spec!r}; give {_SPLITS}")
    if isinstance(spec.get("parts"), Mapping):  # a `Split` as YAML or JSON has it
        return Split(**{**spec, "parts": tuple(spec["parts"].items())})
    if not spec or not all(isinstance(size, int) and size > 0 for size in spec.values()):
        raise LayerwiseError(f"it has sizes {dict(spec)}; give a positive number of rows for each part")
    total, d_out = sum(spec.values()), whole.stack_shape(shape)[1]
    if total != d_out:
        inputs = f"({spec.get('heads', len(spec))} i)"  # so many equal parts, "heads" of them where that is said
        pattern = f"{inputs} o" if isinstance(whole, TransposedLayout) else f"o {inputs}"
        raise LayerwiseError(
            f"the sizes {dict(spec)} add up to {total}, but its d_out is {d_out} (shape {tuple(shape)}, stored {whole}); "
            f"give sizes that add up to {d_out}, or for parts of d_in a pattern such as {pattern!r}"
        )
    return Split.of_sizes(spec) if len(spec) > 1 else None


def overridden(found: Found, given: Mapping[str, Any]) -> Assigned:
    options = dict(given)
    if "params" in options:
        raise LayerwiseError(f"overrides: 'params' of {found.name} cannot be overridden; patterns choose the parameters")
    role = options.pop("role", found.role)
    _check_role(role, found.name)
    layout = options.pop("layout", None)
    if layout is None:
        layout = found.layout if role == found.role else _layout_of_role(found, role)
    elif not isinstance(layout, Layout):
        raise LayerwiseError(f"overrides: layout of {found.name} is {layout!r}; give one of layerwise.geometry's layouts")
    try:
        layout.shapes(tuple(found.parameter.shape))
    except LayerwiseError as error:
        raise LayerwiseError(f"overrides: {found.name}: {error}") from None
    geometry = options.pop("geometry", None) or default_geometry(role, found.kernel, layout)
    if not isinstance(geometry, Geometry):
        raise LayerwiseError(f"overrides: geometry of {found.name} is {geometry!r}; give one, such as Spectral()")
    if role == "vector" or (found.undecayed and role == found.role):
        options.setdefault("weight_decay", 0.0)
    known = role != found.role or "layout" in given
    return Assigned(replace(found, role=role, layout=layout, note="" if known else found.note), geometry, options)


def _layout_of_role(found: Found, role: str) -> Layout:
    """The layout that goes with a role the user gave."""
    if role == "vector":
        return VectorLayout()
    if role == "embedding" and found.note and isinstance(found.layout, MatrixLayout):
        return TransposedLayout()  # a bare [N, d] table; a Linear that acts as an embedding keeps its orientation
    return replace(found.layout, split=None) if role in ("embedding", "head") else found.layout
