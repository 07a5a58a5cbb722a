"""What `param_groups` makes of a model, as rows, as a table of text, and as HTML for notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from layerwise.common.alike_names import in_one, siblings_of
from layerwise.common.checked import checked
from layerwise.common.group_by import group_by
from layerwise.common.text_table import count, text_table, titled
from layerwise.geometry.declared import Assigned, Overrides, Splits
from layerwise.geometry.forward import Forward
from layerwise.geometry.found import ROLES, How, Origin
from layerwise.geometry.groups import Model, assign, frozen_names
from layerwise.geometry.layout import Layout
from layerwise.geometry.norms import Geometry


@dataclass(frozen=True)
class Row:
    """One trainable tensor.

    Attributes:
        name: its first name.
        tied: its other names.
        role: what it does.
        geometry: the norm of its units.
        norm_group: units of one such group have their noise compared.
        shape: of the tensor.
        layout: how it holds its units.
        units: the names of its matrices.
        note: what is not certain about it, "" if nothing.
        how: how its role is known: by the forward pass, by the module that owns it, or assumed from name and shape.
    """

    name: str
    tied: tuple[str, ...]
    role: str
    geometry: Geometry
    norm_group: str
    shape: tuple[int, ...]
    layout: Layout
    units: tuple[str, ...]
    note: str = ""
    how: How = "module"


@dataclass(frozen=True)
class Description:
    """Every trainable parameter of a model. `str()` is a table with one line for layers that are alike.

    Attributes:
        rows: one for each parameter.
        entries: how many entries they have together.
        frozen: names of the parameters that are left out.
        said: why a batch could not be used, "" if it was or none was given.
    """

    rows: tuple[Row, ...]
    entries: int
    frozen: tuple[str, ...]
    said: str = ""

    def summary(self) -> str:
        """One line: how many entries, of how many parameters, in which roles, and what was left out."""
        tensors = Counter(row.role for row in self.rows)
        units = Counter[str]()
        for row in self.rows:
            units[row.role] += len(row.units)
        roles = [
            f"{tensors[role]} {role}" + (f" ({units[role]} units)" if units[role] != tensors[role] else "")
            for role in ROLES
            if tensors[role]
        ]
        left_out = f"; {len(self.frozen)} frozen left out" if self.frozen else ""
        assumed = sum(bool(row.note) for row in self.rows)
        unsure = f"; {assumed} not certain" if assumed else ""
        return f"{count(self.entries)} entries in {len(self.rows)} parameters: {', '.join(roles)}{left_out}{unsure}"

    def notes(self) -> tuple[str, ...]:
        """One line for every tie and every assumption; layers that are alike share a line."""
        lines = []
        for name, rows in _alike(self.rows):
            if rows[0].tied:
                lines.append(f"{name} is tied to {', '.join(rows[0].tied)}")
            if rows[0].note:
                lines.append(f"{name}: {rows[0].note}")
        return tuple(lines)

    def full(self) -> str:
        """The table with a line for every parameter."""
        return _text([(row.name, [row]) for row in self.rows])

    def __str__(self) -> str:
        notes = [f"  {line}" for line in self.notes()]
        said = [f"  {self.said}"] if self.said else []
        return "\n".join([_text(_alike(self.rows)), "", self.summary(), *said, *notes])

    def _repr_html_(self) -> str:
        titles, *lines = titled([_cells(name, rows) for name, rows in _alike(self.rows)])
        head = "".join(f"<th style='text-align:left'>{escape(cell)}</th>" for cell in titles)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
        )
        notes = "".join(f"<li>{escape(line)}</li>" for line in self.notes())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(self.summary())}</p>" + (
            f"<ul>{notes}</ul>" if notes else ""
        )


@checked
def describe(
    model: Model,
    batch: Any = None,
    overrides: Overrides | None = None,
    splits: Splits | None = None,
    forward: Forward | None = None,
) -> Description:
    """Role, geometry, norm group, layout and units of every trainable parameter; arguments as in `param_groups`.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> found = lw.describe(model, torch.arange(6))
        >>> [(row.name, row.role) for row in found.rows]
        [('0.weight', 'embedding'), ('1.weight', 'hidden'), ('1.bias', 'vector'), ('3.weight', 'head'), ('3.bias', 'vector')]
        >>> print(str(found).splitlines()[-1])
        170 entries in 5 parameters: 1 embedding, 1 head, 1 hidden, 2 vector
    """
    parameters, said = assign(Origin(model, overrides, splits), batch, forward)
    entries = sum(assigned.found.parameter.numel() for assigned in parameters)
    return Description(tuple(map(_row, parameters)), entries, tuple(frozen_names(model)), said or "")


def _row(assigned: Assigned) -> Row:
    found, shape = assigned.found, tuple(assigned.found.parameter.shape)
    return Row(
        name=found.name,
        tied=found.tied,
        role=found.role,
        geometry=assigned.geometry,
        norm_group=assigned.norm_group,
        shape=shape,
        layout=found.layout,
        units=found.layout.unit_names(found.name, shape),
        note=found.note,
        how=found.how,
    )


def _alike(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that differ in the numbers of their names alone, under one name: `h.{0-11}.mlp.c_fc.weight`."""

    def same(row: Row) -> tuple[object, ...]:
        siblings, seen = siblings_of(row.name), (row.note, row.how)
        return siblings, row.role, repr(row.geometry), row.norm_group, row.shape, repr(row.layout), seen

    groups = group_by(rows, same).values()
    return [(in_one([row.name for row in group]), group) for group in groups]


def _cells(name: str, rows: list[Row]) -> dict[str, str]:
    row, each = rows[0], len(rows[0].units)
    return {
        "parameter": name + (" *" if row.note else ""),
        "role": row.role,
        "shape": " x ".join(map(str, row.shape)) or "scalar",
        "stored": str(row.layout),
        "units": f"{len(rows)} x {each}" if len(rows) > 1 else str(each),
        "geometry": str(row.geometry),
        "norm group": "" if row.norm_group == row.geometry.norm_group else row.norm_group,
        "by": row.how,
    }


def _text(lines: list[tuple[str, list[Row]]]) -> str:
    return text_table([_cells(name, rows) for name, rows in lines])
