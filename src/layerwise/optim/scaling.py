"""Static step factors, by shape alone.

The field says "Muon scaling" for at least two different things, so the names here say what they do. With O the polar
factor U V^T of a full-rank d_out x d_in matrix, a spectral step of learning rate one and radius one is

=============  ===================================  ==========================================================
``unit``       sqrt(d_out / d_in) O                 norm one in the layer's own geometry: Scion (2502.07529)
``floored``    sqrt(max(1, d_out / d_in)) O         Jordan's Muon; torch.optim.Muon's ``"original"``
``rms_0.2``    0.2 sqrt(max(d_out, d_in)) O         entries of RMS 0.2, about AdamW's: Moonlight's D-Muon
                                                    (2502.16982); torch.optim.Muon's ``"match_rms_adamw"``
``orthogonal`` O                                    the polar factor itself
=============  ===================================  ==========================================================

``unit`` and ``rms_0.2`` mean the same in every geometry. The other two are defined for spectral steps, and for rows that
are normalised one by one (the filters of a depthwise convolution): each is a 1 x d_in matrix, whose O has length one.
"""

from __future__ import annotations

import math
from typing import Final

from layerwise.errors import LayerwiseError
from layerwise.geometry import Geometry, Layout

SCALINGS: Final = ("unit", "floored", "rms_0.2", "orthogonal")


def step_factor(scaling: str, geometry: Geometry, d_out: int, d_in: int) -> float:
    """What the unit step of ``geometry`` on a ``d_out x d_in`` matrix is multiplied by."""
    if scaling == "unit":
        return 1.0
    unit_rms = geometry.unit_rms(d_out, d_in)
    if scaling == "rms_0.2":
        return 0.2 / unit_rms  # spectral: the unit step is sqrt(d_out / d_in) O, so 0.2 sqrt(max(d_out, d_in)) O
    if geometry.family == "row_norm":
        return 1.0 / (unit_rms * math.sqrt(d_in))
    if geometry.family != "spectral":
        raise LayerwiseError(
            f"scaling={scaling!r} is defined for spectral steps, not for {geometry!r}: give 'unit' or 'rms_0.2'"
        )
    # The entries of the polar factor of a full-rank matrix have RMS 1 / sqrt(max(d_out, d_in)).
    orthogonal = 1.0 / (unit_rms * math.sqrt(max(d_out, d_in)))
    if scaling == "orthogonal":
        return orthogonal
    if scaling == "floored":
        return orthogonal * math.sqrt(max(1.0, d_out / d_in))
    raise LayerwiseError(f"scaling={scaling!r}: give one of {', '.join(map(repr, SCALINGS))}")


def step_factors(
    layout: Layout, geometry: Geometry, scaling: str, radius: float, shape: tuple[int, ...]
) -> tuple[float, ...]:
    """What the unit steps of a parameter are multiplied by, one factor for each stack of its layout; 0 for an empty one.

    Raises :class:`LayerwiseError` where the scaling or the layout does not fit.
    """
    return tuple(
        radius * step_factor(scaling, geometry, d_out, d_in) if k and d_out and d_in else 0.0
        for k, d_out, d_in in layout.shapes(shape)
    )
