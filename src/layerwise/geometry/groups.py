"""From a model to the groups of an optimizer: roles, then the user's splits and overrides, then groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise.common.checked import checked
from layerwise.common.parameter_names import canonical_name, unwrap
from layerwise.common.similar import nearest
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.axes import layout_of
from layerwise.geometry.forward import Forward, look
from layerwise.geometry.found import ROLES, Found
from layerwise.geometry.layout import (
    ConvLayout,
    DepthwiseLayout,
    Layout,
    MatrixLayout,
    Split,
    TransposedLayout,
    VectorLayout,
)
from layerwise.geometry.modules.roles import find_roles
from layerwise.geometry.norms import Geometry, RowNorm, Sign, Spectral, VectorRMS, spectral_conv

Override = Geometry | Mapping[str, Any]
#: Several of them stand one after the other, and the later one wins.
Overrides = Mapping[str, Override] | Sequence[Mapping[str, Override]]
SplitSpec = int | str | Mapping[str, int] | Split

#: What a model is where parameters may come in its place.
Model = Annotated[nn.Module, "the model (an nn.Module); for plain parameters use group_by_shape(parameters)"]

_SPLITS = "give a number of equal parts, a dict of sizes, a Split, or a pattern such as 'o (4 i)'"


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
    if role in ("hidden", "experts", "conv", "lora_A", "lora_B"):
        return spectral_conv(kernel) if kernel else Spectral()
    return {"embedding": Sign(), "head": Sign(per_input=True), "vector": VectorRMS()}[role]


@checked
def param_groups(
    model: Model,
    batch: Any = None,
    overrides: Overrides | None = None,
    splits: Mapping[str, SplitSpec] | None = None,
    forward: Forward | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for a layerwise optimizer: one for each role, layout, geometry and set of overrides.

    Args:
        model: the model, on any device, the meta device too; wrapped, compiled or sharded or not.
        batch: what the model takes (a tensor, a tuple of arguments, a dict of keywords). The model is run on it once, in
            evaluation mode and without gradients, to see what each parameter does; nothing of it changes. A model of
            transformers gets a small batch made for it. Without one, roles come from the modules, and one warning
            counts what is not certain. (A dict without tensors in this place is taken for `overrides`.)
        overrides: glob pattern on the parameter's name (any of its names if tied) -> a geometry, or a dict of
            group options: `geometry`, `role`, `layout`, and those of the optimizer, such as `lr` or `weight_decay`.
            `"role:vector"` stands for all parameters of a role, and patterns on names add to it or win over it. Of a
            list of such dicts the later ones win.
        splits: glob pattern -> how a parameter divides into matrices: `{"q": 512, "k": 128, "v": 128}` (rows of d_out, in
            order), a number of equal parts (1 leaves the parameter whole), a `Split`, or a pattern of `AxesLayout` such
            as `"o (4 i)"`, four matrices along d_in.
        forward: `forward(model, batch)` runs the model, where a plain call does not.

    Returns:
        Groups `{"params": [(name, parameter), ...], "role": str, "layout": Layout, "geometry": Geometry, **overridden}`.
        Gains, biases, tables of positions and what the model's own `no_weight_decay()` names have `weight_decay` 0 in
        theirs, which stands above an optimizer's, unless an override gives them another.
        Groups and their parameters keep the order of `model.named_parameters()`; names are without the steps that
        wrappers add; frozen and empty parameters are left out.

    Raises:
        LayerwiseError: a pattern that matches nothing, a parameter matched by two patterns, sizes that do not add up,
            and a model without trainable floating-point parameters.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> batch = torch.arange(6)
        >>> groups = lw.param_groups(model, batch, overrides={"1.weight": {"weight_decay": 0.0}})
        >>> [(group["role"], group["params"][0][0]) for group in groups]
        [('embedding', '0.weight'), ('hidden', '1.weight'), ('vector', '1.bias'), ('head', '3.weight')]
        >>> optimizer = lw.Lanton(groups, lr=2e-3)
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    everything, said = assign(model, batch, overrides, splits, forward)
    doubts = sum(bool(assigned.found.note) for assigned in everything)
    if said:
        warn(said)
    elif doubts and batch is None:
        warn(
            f"the roles of {doubts} parameters are not certain: print(layerwise.describe(model)) says which and why; "
            "param_groups(model, batch) finds them by running the model once"
        )
    for assigned in everything:
        found, geometry, options = assigned.found, assigned.geometry, assigned.options
        key = (found.role, repr(found.layout), repr(geometry), repr(sorted(options.items())))
        group = groups.setdefault(
            key, {"params": [], "role": found.role, "layout": found.layout, "geometry": geometry, **options}
        )
        group["params"].append((found.name, found.parameter))
    return list(groups.values())


def assign(
    model: nn.Module,
    batch: Any = None,
    overrides: Overrides | None = None,
    splits: Mapping[str, SplitSpec] | None = None,
    forward: Forward | None = None,
) -> tuple[list[Assigned], str]:
    """Every trainable parameter with its role, layout, geometry and options; arguments as in `param_groups`.

    Returns:
        The parameters, and a line that says why a batch that was given could not be used, "" if it was or none was given.
    """
    if overrides is None and _are_overrides(batch):
        batch, overrides = None, batch
    trainable, said = _trainable(model, batch, forward)
    names = [(*found.names, *map(canonical_name, found.names)) for found in trainable]
    frozen = frozen_names(model)
    split_of = _match("splits", splits or {}, names, frozen)
    options_of = _options(overrides or {}, trainable, names, frozen)
    undecayed = _named_undecayed(unwrap(model))
    result = []
    for found in trainable:
        if found.name in split_of:
            found = replace(found, layout=_split_layout(found, split_of[found.name]), note="")
        found = replace(found, undecayed=found.undecayed or not undecayed.isdisjoint(found.names))
        result.append(_override(found, options_of.get(found.name, {})))
    return result, said if batch is not None or forward is not None else ""


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [canonical_name(name) for name, p in unwrap(model).named_parameters() if not p.requires_grad]


def _named_undecayed(model: nn.Module) -> set[str]:
    """What the model itself says is not to be decayed: timm's models have a method for it."""
    named = getattr(model, "no_weight_decay", None)
    return {canonical_name(str(name)) for name in named()} if callable(named) else set()


def _are_overrides(batch: Any) -> bool:
    """Whether a dict stands where overrides stood before there was a batch: a batch holds tensors."""
    return isinstance(batch, Mapping) and not any(isinstance(value, Tensor) for value in batch.values())


@checked
def group_by_shape(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Groups as of `param_groups` for plain `model.parameters()` or `model.named_parameters()`, by shape alone.

    2-D tensors become hidden matrices, 0-D and 1-D ones vectors (not decayed), all others convolutions; a UserWarning
    says what a shape cannot tell. Parameters without names are called `param_0`, `param_1`, ...

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     groups = lw.group_by_shape(nn.Linear(4, 8).named_parameters())
        >>> [(group["role"], group["params"][0][0]) for group in groups]
        [('hidden', 'weight'), ('vector', 'bias')]
    """
    named = [item if isinstance(item, tuple) else (f"param_{i}", item) for i, item in enumerate(params)]
    if not named:
        raise LayerwiseError("no parameters: give model.parameters() of a model that has some")
    if len({id(p) for _, p in named}) < len(named):
        raise LayerwiseError("a parameter is given twice: give every tensor once")
    warn(
        "parameters are grouped by shape alone, which cannot tell an embedding or an output head from a hidden "
        "matrix, nor (in, out) storage (transformers' Conv1D) from (out, in), nor q, k and v in one weight, nor "
        "experts from a convolution; give layerwise.param_groups(model) instead"
    )
    groups: dict[str, dict[str, Any]] = {}
    for name, p in named:
        _check_dtype(name, p)
        role, layout, kernel = _by_shape(tuple(p.shape))
        geometry = default_geometry(role, kernel)
        group: dict[str, Any] = {"params": [], "role": role, "layout": layout, "geometry": geometry}
        if role == "vector":
            group["weight_decay"] = 0.0
        groups.setdefault(repr((role, geometry)), group)["params"].append((name, p))
    return list(groups.values())


def _by_shape(shape: tuple[int, ...]) -> tuple[str, Layout, tuple[int, ...]]:
    if len(shape) <= 1:
        return "vector", VectorLayout(), ()
    if len(shape) == 2:
        return "hidden", MatrixLayout(), ()
    return "conv", ConvLayout(), shape[2:]


def _trainable(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[list[Found], str]:
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise LayerwiseError(
                f"{name} has no shape yet (a lazy module): run the model once on a batch first"
            )
        if getattr(p, "_is_flat_param", False):
            raise LayerwiseError(
                f"{name} is flattened by FSDP1, its matrices are lost: use FSDP2's fully_shard"
            )
        if p.requires_grad:
            _check_dtype(name, p)
    seen = look(model, batch, forward)
    everything = find_roles(unwrap(model), seen.evidence)
    if not everything:
        raise LayerwiseError(f"{type(model).__name__} has no parameters: there is nothing to train")
    trainable = [found for found in everything if found.parameter.requires_grad and found.parameter.numel()]
    if not trainable:
        raise LayerwiseError(
            f"all {len(everything)} parameters of {type(model).__name__} are frozen or empty: "
            "set requires_grad=True on those to train"
        )
    return trainable, seen.said


def _check_dtype(name: str, p: Any) -> None:
    if not isinstance(p, Tensor):
        raise LayerwiseError(f"{name} is {type(p).__name__}; parameters are tensors or (name, tensor) pairs")
    if p.is_complex():
        raise LayerwiseError(f"{name} is complex ({p.dtype}): train its view_as_real, or freeze it")
    if not p.is_floating_point():
        raise LayerwiseError(
            f"{name} is of type {p.dtype}: freeze it (requires_grad=False) or make it floating-point"
        )


def _match(
    argument: str, patterns: Mapping[str, Any], names: list[tuple[str, ...]], frozen: list[str]
) -> dict[str, Any]:
    """First name of each parameter that a pattern matches -> the pattern's value."""
    matched_by: dict[str, str] = {}
    for pattern in patterns:
        hits = [own[0] for own in names if any(fnmatchcase(name, pattern) for name in own)]
        if not hits and any(fnmatchcase(name, pattern) for name in frozen):
            raise LayerwiseError(
                f"{argument}: {pattern!r} matches frozen parameters only; drop it or unfreeze them"
            )
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


def _options(
    overrides: Overrides, trainable: list[Found], names: list[tuple[str, ...]], frozen: list[str]
) -> dict[str, dict[str, Any]]:
    """First name of each parameter that something overrides -> its options: by role, then by name, then the next dict."""
    merged: dict[str, dict[str, Any]] = defaultdict(dict)
    for layer in [overrides] if isinstance(overrides, Mapping) else overrides:
        by_role = {
            key.removeprefix("role:"): value for key, value in layer.items() if key.startswith("role:")
        }
        for role in by_role:
            _check_role(role, "'role:...'")
        for found in trainable:
            if found.role in by_role:
                merged[found.name] |= _as_options(found.name, by_role[found.role])
        by_name = {key: value for key, value in layer.items() if not key.startswith("role:")}
        for name, value in _match("overrides", by_name, names, frozen).items():
            merged[name] |= _as_options(name, value)
    return merged


def _as_options(name: str, value: Override) -> dict[str, Any]:
    if not isinstance(value, (Geometry, Mapping)):
        raise LayerwiseError(f"overrides: {name} has {value!r}; give a geometry or a dict of options")
    return {"geometry": value} if isinstance(value, Geometry) else dict(value)


def _check_role(role: str, of: str) -> None:
    if role not in ROLES:
        near = nearest(str(role), ROLES, cutoff=0.6)
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


def _split_layout(found: Found, spec: SplitSpec) -> Layout:
    shape = tuple(found.parameter.shape)
    if isinstance(spec, str):
        return _patterned(found, spec)
    whole = replace(found.layout, split=None)
    d_out = whole.stack_shape(shape)[1]
    if isinstance(spec, Mapping):
        if not spec or not all(isinstance(size, int) and size > 0 for size in spec.values()):
            raise LayerwiseError(
                f"splits: {found.name} has sizes {dict(spec)}; give a positive number of rows for each part"
            )
        if sum(spec.values()) != d_out:
            raise LayerwiseError(
                f"splits: the sizes of {found.name}, {dict(spec)}, add up to {sum(spec.values())}, "
                f"but its d_out is {d_out} (shape {shape}, stored {whole}); give sizes that add up to {d_out}"
            )
        split = Split.of_sizes(spec) if len(spec) > 1 else None
    elif isinstance(spec, Split):
        split = spec
    elif isinstance(spec, int) and not isinstance(spec, bool) and spec >= 1:
        split = Split.equal(*map(str, range(spec))) if spec > 1 else None
    else:
        raise LayerwiseError(f"splits: {found.name} has {spec!r}; {_SPLITS}")
    if split is not None:
        try:
            split.rows(d_out)
        except LayerwiseError as error:
            raise LayerwiseError(f"splits: {found.name} of shape {shape}: {error}") from None
    return replace(whole, split=split)


def _patterned(found: Found, pattern: str) -> Layout:
    try:
        layout = layout_of(pattern)
        layout.shapes(tuple(found.parameter.shape))
    except LayerwiseError as error:
        raise LayerwiseError(
            f"splits: {found.name} of shape {tuple(found.parameter.shape)} has {pattern!r}; {_SPLITS} ({error})"
        ) from None
    return layout


def _override(found: Found, given: Mapping[str, Any]) -> Assigned:
    options = dict(given)
    if "params" in options:
        raise LayerwiseError(
            f"overrides: 'params' of {found.name} cannot be overridden; patterns choose the parameters"
        )
    role = options.pop("role", found.role)
    _check_role(role, found.name)
    layout = options.pop("layout", None)
    if layout is None:
        layout = found.layout if role == found.role else _layout_of_role(found, role)
    elif not isinstance(layout, Layout):
        raise LayerwiseError(
            f"overrides: layout of {found.name} is {layout!r}; give one of layerwise.geometry's layouts"
        )
    try:
        layout.shapes(tuple(found.parameter.shape))
    except LayerwiseError as error:
        raise LayerwiseError(f"overrides: {found.name}: {error}") from None
    geometry = options.pop("geometry", None) or default_geometry(role, found.kernel, layout)
    if not isinstance(geometry, Geometry):
        raise LayerwiseError(
            f"overrides: geometry of {found.name} is {geometry!r}; give one, such as Spectral()"
        )
    if role == "vector" or (found.undecayed and role == found.role):
        options.setdefault("weight_decay", 0.0)
    known = role != found.role or "layout" in given
    return Assigned(
        replace(found, role=role, layout=layout, note="" if known else found.note), geometry, options
    )


def _layout_of_role(found: Found, role: str) -> Layout:
    """The layout that goes with a role the user gave."""
    if role == "vector":
        return VectorLayout()
    if role == "embedding" and found.note and isinstance(found.layout, MatrixLayout):
        return (
            TransposedLayout()
        )  # a bare [N, d] table; a Linear that acts as an embedding keeps its orientation
    return replace(found.layout, split=None) if role in ("embedding", "head") else found.layout
