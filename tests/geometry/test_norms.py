"""Each geometry against the definition of a dual pair, on every kind of matrix, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import make, rounding, stacks
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import ColNorm, Frobenius, Geometry, RowNorm, Sign, Spectral, VectorRMS, spectral_conv

EXACT: tuple[Geometry, ...] = (
    Spectral("svd", "svd"),
    Sign(),
    Sign(per_input=True),
    RowNorm(),
    ColNorm(),
    Frobenius(),
    VectorRMS(),
)
geometries = pytest.mark.parametrize("geometry", EXACT, ids=repr)
examples = settings(max_examples=40)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum((-2, -1))


def slack(g: Tensor) -> float:
    """Relative error allowed: entries are rounded to the dtype (once in g, once in the step), and sums of up to 480 terms
    and decompositions of up to 40 rows are good to a few dozen roundings of the dtype computed in."""
    return 2 * rounding(g) + 64 * (2.3e-16 if g.dtype == torch.float64 else 1.2e-7)


@geometries
@examples
@given(g=stacks())
def test_a_unit_step_has_norm_one_and_reaches_the_dual_norm(geometry: Geometry, g: Tensor) -> None:
    step, dual = geometry.lmo(g), geometry.dual_norm(g)
    assert step.shape == g.shape
    assert step.dtype == g.dtype
    assert torch.isfinite(step).all()
    zero = (g == 0).all(-1).all(-1)
    assert (step[zero] == 0).all()
    assert (dual[zero] == 0).all()
    torch.testing.assert_close(
        geometry.norm(step)[~zero].double(), torch.ones_like(dual[~zero]).double(), rtol=slack(g), atol=0
    )
    torch.testing.assert_close(inner(g, step), dual.double(), rtol=slack(g), atol=1e-44 if g.dtype != torch.float64 else 0)


@geometries
@examples
@given(
    g=stacks(scales=(1.0,)),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(("gaussian", "rank_one", "sparse")),
)
def test_no_direction_of_norm_one_is_steeper(geometry: Geometry, g: Tensor, seed: int, kind: str) -> None:
    x = make(kind, tuple(g.shape), seed).to(g.dtype)
    bound = geometry.dual_norm(g).double() * geometry.norm(x).double()
    assert (inner(g, x) <= bound * (1 + slack(g)) + 1e-12).all()


@geometries
@examples
@given(g=stacks(scales=(1.0,)), exponent=st.integers(-60, 60))
def test_the_scale_of_a_gradient_changes_only_its_dual_norm(geometry: Geometry, g: Tensor, exponent: int) -> None:
    scaled = g * 2.0**exponent  # exact in every dtype
    assert torch.equal(geometry.lmo(scaled), geometry.lmo(g))
    torch.testing.assert_close(geometry.dual_norm(scaled), geometry.dual_norm(g) * 2.0**exponent, rtol=slack(g), atol=0)


@geometries
@pytest.mark.parametrize(("d_out", "d_in"), [(24, 24), (12, 40), (40, 12)])
def test_unit_rms_and_white_noise(geometry: Geometry, d_out: int, d_in: int) -> None:
    noise = torch.randn(50, d_out, d_in, generator=torch.Generator().manual_seed(1))
    rms = geometry.lmo(noise).square().mean((-2, -1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, geometry.unit_rms(d_out, d_in)), rtol=1e-4, atol=0)
    # First order: a square Gaussian matrix has a nuclear norm of 8 / (3 pi) = 0.85 of n sqrt(n); all else is nearer to one.
    ratio = geometry.dual_norm(noise).mean().item() / geometry.white_noise_dual(d_out, d_in)
    assert 0.82 < ratio < 1.03


def test_closed_forms() -> None:
    g = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -12.0]])
    scale = math.sqrt(2 / 3)  # singular values 5 and 12
    expected = {
        Spectral("svd", "svd"): (12 / scale, 17 * scale),
        Sign(): (12.0, 19.0),
        Sign(per_input=True): (36.0, 19 / 3),
        RowNorm(): (math.sqrt(3) * 12, 17 / math.sqrt(3)),
        ColNorm(): (12 / math.sqrt(2), 19 * math.sqrt(2)),
        Frobenius(): (13.0, 13.0),
        VectorRMS(): (13 / math.sqrt(6), 13 * math.sqrt(6)),
    }
    for geometry, (norm, dual) in expected.items():
        assert geometry.norm(g).item() == pytest.approx(norm, rel=1e-6)
        assert geometry.dual_norm(g).item() == pytest.approx(dual, rel=1e-6)


@pytest.mark.parametrize(("kernel", "taps"), [(3, 9), ((3, 3), 9), ((3, 1), 3), ((5,), 5)])
def test_convolutions_take_scions_step(kernel: int | tuple[int, ...], taps: int) -> None:
    out, channels = 6, 4
    geometry = Spectral(polar="svd", nuclear="svd", taps=spectral_conv(kernel).taps)
    assert geometry.taps == taps
    g = torch.randn(out, channels * taps, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(geometry.lmo(g), u @ vh * math.sqrt(out / channels) / taps, rtol=1e-4, atol=1e-6)
    assert geometry.norm(geometry.lmo(g)).item() == pytest.approx(1, rel=1e-5)
    assert geometry.dual_norm(g).item() == pytest.approx(s.sum().item() * math.sqrt(out / channels) / taps, rel=1e-5)


@examples
@given(g=stacks())
def test_the_default_spectral_geometry_keeps_its_stated_bounds(g: Tensor) -> None:
    """Quintic steps: singular values up to 1.21; and `<G, lmo(G)>` within [0.6, 1.21] of a full nuclear norm."""
    geometry, exact = Spectral(), Spectral("svd", "svd")
    step = geometry.lmo(g)
    assert torch.isfinite(step).all()
    assert (geometry.norm(step) <= 1.21 + 2 * rounding(g)).all()
    reached, dual = inner(g, step), exact.dual_norm(g).double()
    assert (reached >= 0.6 * dual - 1e-44).all()
    assert (reached <= (1.21 + 2 * rounding(g)) * dual).all()
    # up to 64 rows the nuclear norm is <G, P(G)> by Polar Express
    torch.testing.assert_close(geometry.dual_norm(g).double(), dual, rtol=5e-3, atol=1e-44)


def test_bad_values_are_named() -> None:
    for make_it, words in (
        (lambda: Spectral(polar="newton"), "polar='newton'"),
        (lambda: Spectral(nuclear="trace"), "nuclear='trace'"),
        (lambda: Spectral(taps=0), "taps=0"),
        (lambda: Spectral(taps=3).lmo(torch.ones(2, 4)), "does not divide d_in = 4"),
        (lambda: Sign().lmo(torch.ones(3)), r"\[d, 1\]"),
        (lambda: Frobenius().norm(torch.ones(3, 3, dtype=torch.int64)), "int64"),
    ):
        with pytest.raises(LayerwiseError, match=words):
            make_it()
