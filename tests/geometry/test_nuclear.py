"""Every method of the nuclear norm against a float64 SVD, and the stochastic one's promises."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from stacks import make, stacks
from torch import Tensor

from layerwise.common.tensors import largest_entry
from layerwise.errors import LayerwiseError
from layerwise.geometry import nuclear_norm
from layerwise.geometry.spectral import lanczos, newton_schulz, spectral
from layerwise.geometry.spectral.lanczos import _roots, _roots_by_products

SPECTRA = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "spectra.py"))
#: What the estimate's docstring promises on every spectrum but one, for every seed.
PROMISED, EXCEPT = 0.1, {"rank 32, tail of 3 decades": 0.14}
examples = settings(max_examples=40)
#: Relative errors as stated in the docstring; "gram" can gain sqrt(eps * n) per missing direction.
BOUNDS = {"svd": 2e-6, "gram": 3e-2, "polar": 5e-3}


def truth(g: Tensor) -> Tensor:
    return torch.linalg.svdvals(g.double()).sum(-1)


@pytest.mark.parametrize("method", BOUNDS)
@examples
@given(g=stacks())
def test_deterministic_methods(method: str, g: Tensor) -> None:
    value = nuclear_norm(g, method)
    assert value.shape == g.shape[:-2]
    assert value.dtype == (torch.float64 if g.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), truth(g), rtol=BOUNDS[method], atol=1e-44)


@examples
@given(g=stacks())
def test_the_estimate_lies_between_the_bounds_of_any_nuclear_norm(g: Tensor) -> None:
    value, length = nuclear_norm(g, "lanczos").double(), torch.linalg.matrix_norm(g.double())
    assert (value >= length * (1 - 1e-5)).all()
    assert (value <= length * math.sqrt(min(g.shape[-2:])) * (1 + 1e-5) + 1e-44).all()


def test_the_estimate_is_exact_for_rank_one_and_for_orthogonal_matrices() -> None:
    for g in (make("rank_one", (3, 70, 90), 0), torch.linalg.qr(make("gaussian", (3, 80, 80), 1))[0]):
        torch.testing.assert_close(nuclear_norm(g.float(), "lanczos").double(), truth(g), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("decay", "bias", "deviation"),
    # as measured over other seeds, and a margin of half
    [(0.0, 0.01, 0.02), (0.5, 0.03, 0.03), (1.0, 0.1, 0.07), (2.0, 0.03, 0.09)],
)
def test_the_error_of_the_estimate_by_spectrum(decay: float, bias: float, deviation: float) -> None:
    """Singular values i^-decay, 192 x 256, 100 probes of the seed: mean and deviation stay within the stated."""
    u, _, vh = torch.linalg.svd(make("gaussian", (192, 256), 0), full_matrices=False)
    g = ((u * torch.arange(1, 193, dtype=torch.float64) ** -decay) @ vh).float()
    errors = torch.stack([nuclear_norm(g, "lanczos", seed=seed) for seed in range(100)]).double() / truth(g) - 1
    assert abs(errors.mean()) < bias
    assert errors.std() < deviation


def assert_within_promise(values: dict[str, Tensor], shape: tuple[int, int], seeds: int) -> None:
    exact = torch.stack([*values.values()])
    g = SPECTRA["with_values"](exact, shape)
    for seed in range(seeds):
        error = nuclear_norm(g, "lanczos", seed=seed).double() / exact.sum(-1) - 1
        wrong = {
            name: round(e, 3) for name, e in zip(values, error.tolist(), strict=True) if abs(e) > EXCEPT.get(name, PROMISED)
        }
        assert not wrong, f"{shape}, seed {seed}"


@pytest.mark.parametrize(
    "shape",
    [
        (65, 260),
        (384, 96),
        (128, 128),
        (192, 192),
        (256, 64 * 9),
        pytest.param((384, 384), marks=pytest.mark.slow),
        pytest.param((768, 768), marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_within_its_promise_on_every_spectrum(shape: tuple[int, int]) -> None:
    """Power laws, geometric, log-spaced, low rank with tails of all kinds, white noise: 59 of them, each with six seeds."""
    assert_within_promise(SPECTRA["closed_forms"](min(shape)), shape, seeds=6)


@pytest.mark.parametrize("width", SPECTRA["recorded_widths"]())
def test_the_estimate_is_within_its_promise_on_gradient_differences(width: int) -> None:
    """Singular values of a GPT-2's, at its 1st, 10th, 100th and 1000th step, as `noise_estimates.py --record` found them."""
    assert_within_promise(SPECTRA["recorded"](width), (width, width), seeds=6)


def test_square_roots_by_eigenvalues_and_by_products_agree() -> None:
    """What a CPU computes and what a GPU does, which must not wait for the host."""
    b = torch.randn(3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
    root, traces = _roots(b, 8)
    torch.testing.assert_close(root @ root, b @ b.mT)
    same, same_traces = _roots_by_products(b, 8)
    # eight Polar Express steps bring singular values above 1e-3 of the largest to one within 1e-5
    torch.testing.assert_close(same, root, rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.stack(same_traces), torch.stack(traces), rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [20, 100])
def test_the_norm_of_what_is_not_finite_is_nan_and_that_of_its_neighbours_is_theirs(n: int) -> None:
    g = make("gaussian", (3, n, n), 0).float()
    alone = nuclear_norm(g[2])
    g[0, 3, 4], g[1, 0, 0] = torch.inf, torch.nan
    found = nuclear_norm(g)
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2], alone)


def test_the_seed_decides_alone() -> None:
    g = make("gaussian", (2, 70, 90), 0).float()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    value = nuclear_norm(g, "lanczos", seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(nuclear_norm(g, "lanczos", seed=torch.tensor(7)), value)
    assert torch.equal(nuclear_norm(g, "lanczos", seed=torch.tensor(7, dtype=torch.int32)), value)
    assert not torch.equal(nuclear_norm(g, "lanczos", seed=8), value)


def test_a_matrix_in_a_batch_has_the_probes_it_has_alone() -> None:
    g = make("gaussian", (3, 70, 90), 0).float()
    seeds = torch.tensor([5, 9, 5])
    together = nuclear_norm(g, "lanczos", seed=seeds)
    for i, seed in enumerate(seeds.tolist()):
        torch.testing.assert_close(nuclear_norm(g[i], "lanczos", seed=seed), together[i], rtol=1e-6, atol=0)
    assert not torch.equal(nuclear_norm(g, "lanczos", seed=5)[1], together[1])


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_the_estimate_at_the_ends_of_float32(scale: float) -> None:
    g = make("steep", (70, 80), 0)
    expected = nuclear_norm(g.float(), "lanczos").double() * scale
    # 1e-40 leaves five digits of a subnormal number
    torch.testing.assert_close(nuclear_norm((g * scale).float(), "lanczos").double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", [(3, 70, 90), (3, 90, 70)])
def test_a_processor_with_bfloat16_reads_a_usual_matrix_as_it_is_and_gets_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    """Nothing is divided by the largest entry first, and X^T is read from the other side: another rounding of float32."""
    usual = make("gaussian", shape, 0).float()
    unusual = usual * torch.tensor([1e-9, 1e20, 0.0])[:, None, None]
    divided: list[Tensor] = []
    monkeypatch.setattr(spectral, "largest_entry", lambda x, dim: divided.append(x) or largest_entry(x, dim))
    monkeypatch.setattr(newton_schulz, "PROCESSOR_UNITS", ("avx512_bf16",))
    monkeypatch.setattr(lanczos, "LEFT_FROM", 0)
    found = nuclear_norm(usual, "lanczos")
    assert not divided
    beyond = nuclear_norm(unusual, "lanczos")
    assert len(divided) == 1
    monkeypatch.setattr(newton_schulz, "PROCESSOR_UNITS", ())
    scaled = nuclear_norm(usual, "lanczos")
    assert len(divided) == 2
    torch.testing.assert_close(found, scaled, rtol=1e-5, atol=0)  # 7 products of rounding 2^-24, times n / p = 9
    torch.testing.assert_close(beyond, nuclear_norm(unusual, "lanczos"), rtol=1e-5, atol=0)


def test_bad_values_are_named() -> None:
    with pytest.raises(LayerwiseError, match="'trace'"):
        nuclear_norm(torch.ones(2, 2), "trace")
    for probes in (0, 3):
        with pytest.raises(LayerwiseError, match=f"probes={probes}.*even"):
            nuclear_norm(torch.ones(2, 2), "lanczos", probes=probes)
    with pytest.raises(LayerwiseError, match=r"\[d, 1\]"):
        nuclear_norm(torch.ones(4))
