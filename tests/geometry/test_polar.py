"""Every method and path of the polar factor against a float64 SVD, and against one another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import make, rounding, stacks
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import Spectral, polar
from layerwise.geometry.spectral import newton_schulz as iteration
from layerwise.geometry.spectral.newton_schulz import (
    BLOCKS_FROM,
    POLYNOMIALS,
    choose_path,
    iteration_dtype,
    newton_schulz,
    normalised_in,
    strip_product,
)
from layerwise.geometry.spectral.shifted_squares import TRACE_FROM, shifts_of

examples = settings(max_examples=40)

#: Singular values of the result for those of G above `floor` of its Frobenius norm: the extremes of each polynomial,
#: computed in `test_stated_ranges_are_those_of_the_polynomials`, as the docstring of `polar` states them.
RANGES = {
    "quintic": (3e-3, 0.68, 1.21),
    "quintic_tuned": (3e-3, 0.97, 1.15),
    "polar_express": (3e-3, 0.87, 1.13),
    "polar_express8": (3e-3, 1 - 1e-5, 1 + 1e-5),
}


@pytest.mark.parametrize("method", RANGES)
def test_stated_ranges_are_those_of_the_polynomials(method: str) -> None:
    floor, low, high = RANGES[method]
    s = torch.linspace(floor, 1, 200_001, dtype=torch.float64)
    for a, b, c in POLYNOMIALS[method]:
        s = a * s + b * s**3 + c * s**5
    assert low <= s.min()
    assert s.max() <= high


@pytest.mark.parametrize("path", ["standard", "blocked", "gram"])
@pytest.mark.parametrize("method", RANGES)
@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (2, 33, 70)])
def test_singular_vectors_are_those_of_the_svd(method: str, shape: tuple[int, ...], path: str) -> None:
    """With `G = U S V^T`, `U^T P(G) V` is diagonal, its diagonal the polynomial of S. Float32, against float64."""
    g = make("gaussian", shape, 0)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    core = u.mT @ polar(g.float(), method, path=path).double() @ vh.mT
    s = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    for a, b, c in POLYNOMIALS[method]:
        s = a * s + b * s**3 + c * s**5
    # rounding of 1.2e-7 in G, times the slope of the polynomials at zero (485 to 1700), over sqrt(48) entries
    torch.testing.assert_close(core, torch.diag_embed(s), rtol=0, atol=3e-5)


@examples
@given(g=stacks())
def test_svd_is_the_polar_factor(g: Tensor) -> None:
    """Exact on the row space, zero off it: `P P^T P = P`, `rank(P) = rank(G)`, `P^T G` symmetric positive semidefinite."""
    p, x = polar(g, "svd").double(), g.double()
    assert torch.isfinite(p).all()
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    tolerance = 64 * max(rounding(g), 1.2e-7 if g.dtype != torch.float64 else 0)
    torch.testing.assert_close(p @ p.mT @ p, p, rtol=0, atol=tolerance)
    inner = p.mT @ x
    torch.testing.assert_close(inner, inner.mT, rtol=0, atol=tolerance * 8)
    nuclear = torch.linalg.svdvals(x).sum(-1)
    torch.testing.assert_close(inner.diagonal(dim1=-2, dim2=-1).sum(-1), nuclear, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [*POLYNOMIALS, "svd"])
@examples
@given(g=stacks(), exponent=st.integers(-20, 20))
def test_scale_zero_and_extremes(method: str, g: Tensor, exponent: int) -> None:
    p = polar(g, method)
    assert p.shape == g.shape
    assert p.dtype == g.dtype
    assert torch.isfinite(p).all()
    assert (p[(g == 0).all(-1).all(-1)] == 0).all()
    scaled = g * 2.0**exponent
    if torch.equal(scaled / 2.0**exponent, g):  # nothing over- or underflowed
        assert torch.equal(polar(scaled, method), p)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e38, 3.4e38])
def test_the_ends_of_float32(value: float) -> None:
    g = torch.tensor([[value, 0.0, 0.0], [0.0, -value, 0.0]])
    torch.testing.assert_close(polar(g, "polar_express8"), torch.eye(2, 3) * torch.tensor([[1.0], [-1.0]]))


@pytest.mark.parametrize("kind", ["gaussian", "steep", "low_rank"])
@pytest.mark.parametrize("path", ["standard", "blocked", "gram"])
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 24, 96), (96, 24), (1, 7), (BLOCKS_FROM, BLOCKS_FROM + 7), (700, 660)])
def test_every_path_computes_the_published_iteration(path: str, shape: tuple[int, ...], kind: str) -> None:
    g = make(kind, shape, 3)
    x = g / torch.linalg.matrix_norm(g, keepdim=True)
    for a, b, c in POLYNOMIALS["quintic"]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    # A float32 rounding in G is multiplied by up to 3.4445^5 = 485; a restarted Gram form sees at most three steps at once,
    # where an error of 1.2e-7 in the square of a singular value has grown by 3.4445^6 = 1670.
    error = torch.linalg.matrix_norm(polar(g.float(), path=path, precision="float32").double() - x, ord=2)
    assert error.max() < 4e-4 if path == "gram" else error.max() < 1e-4


@pytest.mark.parametrize("n", [5, BLOCKS_FROM, 650])
def test_a_symmetric_product_computes_only_half_and_mirrors_it(n: int) -> None:
    g = torch.randn(2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = g + g.mT
    b = a @ a / n  # commutes with a
    out = torch.full_like(a, torch.nan)
    torch.testing.assert_close(strip_product(a, b, out), a @ b)
    torch.testing.assert_close(strip_product(a, b, add=a, beta=0.5, alpha=-2.0), 0.5 * a - 2 * a @ b)


def test_a_stack_is_its_matrices_and_the_input_is_left_alone() -> None:
    g = make("gaussian", (2, 3, 20, 50), 0).float()
    before = g.clone()
    together = polar(g)
    assert torch.equal(g, before)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(polar(g[i, j]), together[i, j], rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(8, 2**15), (2**15, 8), (2, 16, 16)])
def test_the_input_is_left_alone_in_the_precision_of_the_steps(shape: tuple[int, ...]) -> None:
    g = make("gaussian", shape, 0).bfloat16()
    before = g.clone()
    polar(g, precision="bfloat16")
    assert torch.equal(g, before)


def test_half_precision_on_a_cpu_is_computed_in_float32() -> None:
    g = make("gaussian", (30, 30), 0).bfloat16()
    assert torch.equal(polar(g), polar(g.float()).bfloat16())


def test_bad_values_are_named() -> None:
    for call, words in (
        (lambda: polar(torch.ones(2, 2), "newton"), "'newton'"),
        (lambda: polar(torch.ones(2, 2), path="fast"), "'fast'"),
        (lambda: polar(torch.ones(2, 2), precision="half"), "'half'"),
        (lambda: Spectral(precision="half"), "precision='half'"),
        (lambda: polar(torch.ones(4)), r"\(4,\)"),
        (lambda: polar(torch.ones(2, 2, dtype=torch.complex64)), "complex64"),
    ):
        with pytest.raises(LayerwiseError, match=words):
            call()
    assert polar(torch.ones(0, 3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("reported", "found"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, ()),
        ({"avx2": True, "avx512_bf16": True}, ("avx512_bf16",)),
        ({"avx512_bf16": True, "amx_bf16": True}, ("amx_bf16", "avx512_bf16")),
        ({"neon": True, "bf16": True, "sve_bf16": False}, ("bf16",)),
    ],
)
def test_the_processor_is_asked_for_units_that_multiply_bfloat16(
    monkeypatch: pytest.MonkeyPatch, reported: dict[str, bool], found: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported, raising=False)
    assert iteration._units() == found
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # which torch 2.9 has not: it knows of x86 alone
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(reported.get("amx_bf16")))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(reported.get("avx512_bf16")))
    assert iteration._units() == tuple(unit for unit in found if unit != "bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert iteration._units() == ()


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("units", "shape", "given", "precision", "gram", "dtype"),
    [
        ((), (384, 384), F32, "auto", False, F32),
        (("amx_bf16",), (384, 384), F32, "auto", False, BF16),
        (("amx_bf16",), (2, 384, 128), BF16, "auto", False, BF16),
        (("amx_bf16",), (384, 127), F32, "auto", False, F32),  # too small to gain
        (("amx_bf16",), (384, 384), F64, "auto", False, F64),
        (("amx_bf16",), (384, 384), F32, "float32", False, F32),
        (("amx_bf16",), (384, 384), F32, "auto", True, BF16),
        ((), (8, 8), F32, "bfloat16", False, BF16),
        ((), (8, 8), F32, "bfloat16", True, BF16),
    ],
)
def test_the_precision_follows_the_processor_the_size_and_the_caller(
    monkeypatch: pytest.MonkeyPatch,
    units: tuple[str, ...],
    shape: tuple[int, ...],
    given: torch.dtype,
    precision: str,
    gram: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(iteration, "PROCESSOR_UNITS", units)
    assert iteration_dtype(torch.zeros(shape, dtype=given), precision, gram) == dtype


@pytest.mark.parametrize(
    ("shape", "path"),
    [((128, 128), "standard"), ((128, 400), "gram"), ((384, 390), "blocked"), ((640, 650), "blocked")],
)
def test_a_processor_with_units_works_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], path: str
) -> None:
    """On each path that it takes, and by strips (the last). Error by rounding to 8 bits, as on a GPU."""
    monkeypatch.setattr(iteration, "PROCESSOR_UNITS", ("avx512_bf16",))
    g = make("gaussian", shape, 0).float()
    found = polar(g)
    assert found.dtype == F32
    assert torch.equal(found, polar(g, path=path, precision="bfloat16"))
    error = torch.linalg.matrix_norm(found.double() - polar(g.double()), ord=2)
    # 2^-9 in products of order one, times the slope of later steps; up to 0.07 at n = 384 (docs/polar.md)
    assert 1e-4 < error < 0.1
    step = Spectral().lmo(g) / (shape[0] / shape[1]) ** 0.5  # its factor is in the iteration, so other digits are rounded
    assert torch.linalg.matrix_norm(step.double() - polar(g.double()), ord=2) < 0.1
    monkeypatch.setattr(iteration, "PROCESSOR_UNITS", ())
    assert torch.linalg.matrix_norm(polar(g).double() - polar(g.double()), ord=2) < 1e-4


@pytest.mark.parametrize(("units", "path"), [(("amx_bf16",), "standard"), ((), "gram")])
def test_where_torch_was_asked_for_medium_precision_the_gram_form_is_left(
    monkeypatch: pytest.MonkeyPatch, units: tuple[str, ...], path: str
) -> None:
    """On a processor with units, torch then rounds the factors of float32 products to bfloat16."""
    monkeypatch.setattr(iteration, "PROCESSOR_UNITS", units)
    wide = torch.zeros(1, 64, 256)
    assert choose_path(wide) == "gram"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert choose_path(wide) == path
    assert choose_path(wide.double()) == "gram"


def test_a_geometry_s_precision_is_the_caller_s_and_no_part_of_what_a_checkpoint_compares() -> None:
    g = make("gaussian", (40, 60), 0).float()
    factor = (40 / 60) ** 0.5
    assert torch.equal(Spectral(precision="bfloat16").lmo(g), polar(g, precision="bfloat16", scale=factor))
    assert torch.equal(Spectral(precision="float32").lmo(g), polar(g, precision="float32") * factor)
    assert not torch.equal(Spectral(precision="bfloat16").lmo(g), Spectral(precision="float32").lmo(g))
    assert repr(Spectral(precision="bfloat16")) == repr(Spectral())


@pytest.mark.parametrize("decay", ["power", "geometric", "log-spaced"])
def test_pairs_of_gram_steps_in_bfloat16_are_as_accurate_as_the_standard_iteration(decay: str) -> None:
    """Falling spectra, where three steps at once were 0.3 off and the standard iteration 0.13."""
    n = 128
    i = torch.arange(1, n + 1, dtype=torch.float64)
    s = {"power": 1 / i, "geometric": 0.95**i, "log-spaced": 10 ** (-4 * i / n)}[decay]
    noise = torch.randn(n, 4 * n, generator=torch.Generator().manual_seed(0)).double()
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    g = (u * s) @ vh
    errors = {
        path: torch.linalg.matrix_norm(polar(g.float(), path=path, precision="bfloat16").double() - polar(g), ord=2)
        for path in ("standard", "gram")
    }
    assert errors["gram"] < 1.2 * errors["standard"] + 0.03


@pytest.mark.parametrize("method", sorted(POLYNOMIALS))
@pytest.mark.parametrize("scale", [1.0, 0.1, 3.0])
def test_shifted_squares_are_the_polynomials(method: str, scale: float) -> None:
    """On numbers, in float64: `k` of a step times what it is given is what the polynomial is given."""
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    shifts = shifts_of(POLYNOMIALS[method], scale)
    z = x / shifts[0][2]
    for (a, b, c), (s, at_zero, k) in zip(POLYNOMIALS[method], shifts, strict=True):
        torch.testing.assert_close(k * z, x, rtol=1e-9, atol=1e-9)
        z = ((z**2 + s) ** 2 + at_zero - s**2) * z
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(z, scale * x, rtol=1e-9, atol=1e-9)


def test_steep_polynomials_go_one_by_one() -> None:
    g = make("gaussian", (40, 90), 0).float()
    found = {path: polar(g, "polar_express", path=path, precision="bfloat16") for path in ("auto", "standard", "gram")}
    assert torch.equal(found["gram"], found["standard"])
    assert torch.equal(found["auto"], found["standard"])


@pytest.mark.parametrize("n", [48, 512])
def test_no_scale_leaves_the_range_of_shifted_squares(n: int) -> None:
    """Whether a matrix is normalised first (48) or its norm taken from its Gram matrix; zero and nan keep to themselves."""
    assert (n * n >= TRACE_FROM) == (n == 512)
    g = make("gaussian", (n, n), 0).float()
    usual = polar(g, precision="bfloat16")
    for scales in ([1.0, 2.0**40, 2.0**-40, 0.0], [1.0, 2.0**10, 2.0**-10, 3.0], [1.0, float("nan"), 1.0, 1.0]):
        found = polar(g * torch.tensor(scales)[:, None, None], precision="bfloat16")
        for scale, one in zip(scales, found, strict=True):
            if scale == 0.0 or scale != scale:
                assert torch.equal(one.isnan(), torch.full_like(one, scale != scale, dtype=torch.bool))
                assert scale != scale or not one.any()
            else:  # other digits are rounded: 0.05 beside a float64 iteration on either side
                assert torch.linalg.matrix_norm(one - usual, ord=2) < 0.1


@pytest.mark.parametrize("path", ["standard", "gram"])
def test_half_precision_of_a_gpu(path: str) -> None:
    """What a GPU iterates in: bfloat16, and float16 on the Gram path, which bfloat16's 8 bits would send astray.

    Singular values 1 / i^2: rounding to 2^-9 of the largest is 0.3 of those that five steps bring up to one.
    """
    u, _, vh = torch.linalg.svd(
        torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).double(), full_matrices=False
    )
    g = (u * torch.arange(1, 49) ** -2.0) @ vh
    x = normalised_in(g.float(), torch.float16 if path == "gram" else torch.bfloat16)
    assert x.dtype == (torch.float16 if path == "gram" else torch.bfloat16)
    found = newton_schulz(x[None].clone(), POLYNOMIALS["quintic"], path)[0]
    error = torch.linalg.matrix_norm(found.double() - polar(g), ord=2)
    assert error < (0.1 if path == "gram" else 0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_above_zero_is_named(scale):
    with pytest.raises(LayerwiseError, match=f"scale={scale}"):
        polar(torch.eye(3), scale=scale)
