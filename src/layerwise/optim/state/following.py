"""What happens to a model under its optimizer: parameters that are replaced, resized, unfrozen or taken away."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise.common.parameter_names import canonical_name, first_few, unwrap
from layerwise.common.tensors import local_part
from layerwise.errors import LayerwiseError, warn
from layerwise.geometry.found import Origin
from layerwise.geometry.groups import groups_of
from layerwise.optim.groups.options import PARAMETERS
from layerwise.optim.state.state_dict import WITH_ROWS, take
from layerwise.optim.work.job import Group, Job, State

_TAKE_OVER = "call optimizer.add_trainable(model), which takes over what has changed"
_OWN = {"params", "origin", "lr"}  # what says nothing of whether a group fits: schedules move its rate


class Held(NamedTuple):
    """What stood for a name when it was last looked at."""

    param: Tensor
    entries: int  # of the parameter: its data may be resized in place
    origin: Origin | None = None  # the model that it came from, where that is known


class Following:
    """The models that an optimizer's groups were made of, and the tensors that stood there when they were last looked at."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._entries: dict[Tensor, tuple[int, torch.device]] = {}
        self._at_rest: frozenset[str] = frozenset()  # without a gradient when the models were last looked at
        #: of each model, what was frozen when it was last looked at
        self.frozen: list[tuple[Origin, str, weakref.ref[Tensor]]] = []

    # --------------------------------------------------------------------------------------- the optimizer's own

    def note(self, groups: Sequence[Group], origin: Origin | None = None) -> None:
        """Which tensor each name stands for; names that are new come from ``origin``."""
        if origin is not None and origin not in self._origins():
            self._note_frozen(origin)
        before, self._held = self._held, {}
        for group in groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                known = before.get(name)
                came_from = origin if known is None else known.origin
                self._held[name] = Held(param, param.numel(), came_from)
        self._entries = {held.param: (held.entries, held.param.device) for held in self._held.values()}

    def sync(self, groups: Sequence[Group], states: dict[Tensor, State]) -> list[str]:
        """Give state to tensors that stand where others stood, and to those whose size is another; move it to their device.

        accelerate puts others there for FSDP2: it shards the model and hands the sharded parameters to the optimizer.
        Returns the names of the parameters whose state could not be carried over.
        """
        entries = {param: (param.numel(), param.device) for group in groups for param in group["params"]}
        if entries == self._entries and entries.keys() == states.keys():
            return []
        lost = _replace_state(groups, states, self._held)
        before = self._held
        self.note(groups)
        models_have = {id(p) for origin in self._origins() for p in origin.parameters().values()}
        for name, held in self._held.items():
            put_there = name in before and before[name].param is not held.param
            if put_there and id(held.param) not in models_have:  # somebody's master copy: it is not ours to replace
                self._held[name] = held._replace(origin=None)
        return lost

    def _origins(self) -> list[Origin]:
        """The models that are still there."""
        origins = {id(held.origin): held.origin for held in self._held.values()}
        return [origin for origin in origins.values() if origin is not None and origin.model is not None]

    def places(self) -> dict[str, int]:
        """Name -> its number in the order of the models that are still there."""
        names = dict.fromkeys(name for origin in self._origins() for name in origin.parameters())
        return {name: number for number, name in enumerate(names)}

    def _note_frozen(self, origin: Origin) -> None:
        named = origin.parameters().items()
        self.frozen += [(origin, name, weakref.ref(p)) for name, p in named if not p.requires_grad]

    # ---------------------------------------------------------------------------------------------- at every step

    def unfrozen(self) -> list[nn.Module]:
        """The models of which parameters have gradients that were frozen when it was last looked at them; said once.

        Those of a model are left out where the optimizer was not given all that it trained: some are then somebody else's.
        """
        here = {id(param) for param in self._entries}
        found: dict[Origin, list[str]] = {}
        for origin, name, reference in self.frozen:
            param = reference()
            if param is not None and param.requires_grad and param.grad is not None and id(param) not in here:
                found.setdefault(origin, []).append(name)
        whole = [origin for origin in found if self._holds_all(origin, here)]
        self.frozen = [entry for entry in self.frozen if entry[0] not in found]
        for origin, names in found.items():
            had_been = f"{first_few(map(repr, names))} had been frozen when the optimizer was made, have gradients now and"
            if origin in whole:
                warn(
                    f"{had_been} are trained from this step on, with the roles that the model gives them; a schedule made "
                    "before may not know their groups: optimizer.add_trainable(model) takes them over where you can make "
                    "it again"
                )
            else:
                warn(f"{had_been} are not trained by it: call optimizer.add_trainable(model) to train them")
        return [origin.model for origin in whole if origin.model is not None]

    def _holds_all(self, origin: Origin, here: set[int]) -> bool:
        """Whether all that a model trained when it was last looked at is here."""
        frozen = {id(reference()) for _, _, reference in self.frozen}
        trained = [p for p in origin.parameters().values() if p.requires_grad and p.numel()]
        return all(id(p) in here or id(p) in frozen for p in trained)

    def put_in_place(self, groups: Sequence[Group], jobs: Sequence[Job]) -> bool:
        """Put into the groups what the models now hold where they held a parameter without a gradient; whether any was.

        The models are looked at where other parameters than before have no gradient. Raises LayerwiseError for a parameter
        that a model no longer has, and one without numbers.
        """
        at_rest = {job.name: job.param for job in jobs if not job.moves}
        if at_rest.keys() == self._at_rest:
            return False
        self._at_rest = frozenset(at_rest)
        if not any(job.param.requires_grad or job.moves for job in jobs):
            self._warn_all_frozen()
        new = self._successors(at_rest)
        for name, tensor in new.items():
            if tensor is None:
                raise LayerwiseError(
                    f"the model no longer has the parameter {name!r}, or it is frozen or quantised there now: {_TAKE_OVER}"
                )
        for name, param in at_rest.items():
            if param.device.type == "meta" and name not in new:
                raise LayerwiseError(
                    f"parameter {name!r} is on the meta device and has no numbers: the model was materialised after the "
                    f"optimizer was made, and the optimizer does not know where: {_TAKE_OVER}"
                )
        _replace(groups, new)
        self._at_rest -= new.keys()  # so that those put there now are looked for in their turn
        return bool(new)

    def _warn_all_frozen(self) -> None:
        """Say that nothing here is trained, and what the models train in its place: adapters, as a rule."""
        named = [item for origin in self._origins() for item in origin.parameters().items()]
        others = [repr(name) for name, p in named if p.requires_grad and p not in self._entries]
        new = (
            f" The model trains {first_few(others)}: make the optimizer after get_peft_model, or {_TAKE_OVER}."
            if others
            else ""
        )
        warn(f"the optimizer trains nothing: all its parameters, {first_few(map(repr, self._held))}, are frozen now.{new}")

    def _successors(self, names: Iterable[str]) -> dict[str, Tensor | None]:
        """Of the parameters that their model no longer holds: what stands there and can be trained, or None."""
        found: dict[str, Tensor | None] = {}
        for origin in self._origins():
            now = origin.parameters()
            holds = {id(p) for p in now.values()}
            for name in names:
                held = self._held[name]
                if held.origin is origin and id(held.param) not in holds:
                    new = now.get(name)
                    usable = new is not None and new.requires_grad and new not in self._entries
                    found[name] = new if usable else None
        return found

    # ------------------------------------------------------------------------------------------- when one is asked

    def by_role(self, group: Group) -> list[Group]:
        """A group of plain parameters, those of a known model by the roles they have there; any other group as it is."""
        if group.get("layout") is not None or isinstance(group.get("params"), (Tensor, set, frozenset)):
            return [group]
        given = list(group.get("params", ()))
        left = {id(item[1] if isinstance(item, tuple) else item): item for item in given}
        options = {key: value for key, value in group.items() if key not in PARAMETERS}
        parts: list[Group] = []
        for origin in self._origins():
            known = {id(p) for p in origin.parameters().values()}
            for found in groups_of(origin) if known & left.keys() else ():
                mine = [(name, p) for name, p in found["params"] if left.pop(id(p), None) is not None]
                parts += [{**found, **options, "params": mine}] if mine else []
        if not parts:
            return [{**group, "params": given} if "params" in group else group]
        return [*parts, {**options, "params": list(left.values())}] if left else parts

    def take_over(self, groups: list[Group], model: nn.Module, batch: Any) -> tuple[list[str], list[Group]]:
        """Bring the groups up to what the model is now: names that came to groups which were there, and groups to add."""
        origin = next((each for each in self._origins() if each.model is unwrap(model)), None)
        if origin is None:
            origin = Origin(model)
            self._adopt(origin)
        _replace(groups, self._successors(self._held))
        live = {id(p): group for group in groups for p in group["params"]}
        joined, to_add = [], []
        for found in groups_of(origin, batch):
            new = [(name, p) for name, p in found["params"] if id(p) not in live]
            beside = [live[id(p)] for _, p in found["params"] if id(p) in live]
            emptied = [group for group in groups if not group["params"]]
            home = _home(beside, found, ("role", "layout")) or _home(emptied, found, found.keys() - _OWN)
            if new and home is not None:
                for name, p in new:
                    home["params"].append(p)
                    home["param_names"].append(name)
                    self._held[name] = Held(p, 0, origin)  # `sync` gives it state
                    joined.append(name)
            elif new:
                to_add.append({**found, "params": new})
        self.frozen = []
        self._note_frozen(origin)
        return joined, to_add

    def _adopt(self, origin: Origin) -> None:
        """Parameters of unknown models that have the names of this one's are its own."""
        now = origin.parameters()
        for name, held in self._held.items():
            unknown = held.origin is None or held.origin.model is None
            if unknown and name in now:
                self._held[name] = held._replace(origin=origin)


def _home(groups: Sequence[Group], found: Group, keys: Collection[str]) -> Group | None:
    """The first group that agrees with what was found in the keys."""
    return next((group for group in groups if all(group.get(key) == found[key] for key in keys)), None)


def _replace(groups: Sequence[Group], new: Mapping[str, Tensor | None]) -> None:
    """In place: another tensor for some names; None takes the parameter out."""
    for group in groups if new else ():
        rows = [(name, new.get(name, param)) for name, param in zip(group["param_names"], group["params"], strict=True)]
        group["params"][:] = [param for _, param in rows if param is not None]
        group["param_names"][:] = [name for name, param in rows if param is not None]


def check_model(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise :class:`LayerwiseError` for what is no model, and for one of which neither a tensor nor a name is here."""
    if not isinstance(model, nn.Module):
        raise LayerwiseError(f"add_trainable: model is of type {type(model).__name__}: give the model, an nn.Module")
    names = {name for group in groups for name in group["param_names"]}
    tensors = {id(param) for group in groups for param in group["params"]}
    named = [(canonical_name(name), id(p)) for name, p in unwrap(model).named_parameters()]
    if not any(name in names or tensor in tensors for name, tensor in named):
        raise LayerwiseError(
            f"add_trainable: {type(model).__name__} holds none of this optimizer's parameters: give the model that it "
            "trains, or add other parameters by add_param_group"
        )


@torch.no_grad()
def _replace_state(groups: Sequence[Group], states: dict[Tensor, State], holders: Mapping[str, Held]) -> list[str]:
    """Make state for every parameter that has none, or of another size, from that of what stood for its name if it fits.

    Of an embedding or head with more or fewer rows, those that are in both keep their state; that of tensors that are gone
    is dropped. Returns the names of the parameters whose state could not be carried over.
    """
    lost: list[str] = []
    live = set()
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            live.add(param)
            held = holders.get(name, Held(param, param.numel()))
            if param not in states or (held.param is param and held.entries != param.numel()):
                new, old = _allocate(group, name, param), states.get(held.param, {})
                if _has_moved(old) and not take(new, _in_dtypes_of(new, old), group["role"] in WITH_ROWS):
                    lost.append(name)
                states[param] = new
            move_beside(param, states[param])
    for param in states.keys() - live:
        del states[param]
    return lost


def _allocate(group: Group, name: str, param: Tensor) -> State:
    try:
        state: State = group["update"].allocate(group, name, param)
    except LayerwiseError as error:
        if param.ndim != 1:
            raise
        raise LayerwiseError(
            f"{error}. Was it flattened? DeepSpeed's ZeRO stages 1 to 3 and FSDP1 do so, and no matrix is left: use FSDP2 "
            "(fully_shard), or stage 0"
        ) from None
    return state


def move_beside(param: Tensor, state: State) -> None:
    """Bring the state to the device of its parameter: frameworks move a model after the optimizer was made."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != param.device:
            state[key] = value.to(param.device)


def _has_moved(state: State) -> bool:
    """Whether a step has changed it: but for multipliers, which follow the rest, and sizes it starts as zeros."""
    constant = ("multiplier", "size")
    tensors = [value for key, value in state.items() if isinstance(value, Tensor) and key not in constant]
    return any(value.device.type != "meta" and bool(local_part(value).any()) for value in tensors)


def _in_dtypes_of(new: State, old: State) -> State:
    pairs = ((key, value, new.get(key)) for key, value in old.items())
    return {k: v.to(own.dtype) if isinstance(v, Tensor) and isinstance(own, Tensor) else v for k, v, own in pairs}
