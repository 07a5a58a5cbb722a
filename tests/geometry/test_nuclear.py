"""Every method of the nuclear norm against a float64 SVD, and the stochastic one's promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from stacks import make, stacks
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.geometry import nuclear_norm

examples = settings(max_examples=40, deadline=None)
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
    errors = (
        torch.stack([nuclear_norm(g, "lanczos", seed=seed) for seed in range(100)]).double() / truth(g) - 1
    )
    assert abs(errors.mean()) < bias
    assert errors.std() < deviation


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
    torch.testing.assert_close(
        nuclear_norm((g * scale).float(), "lanczos").double(), expected, rtol=2e-3, atol=0
    )


def test_bad_values_are_named() -> None:
    with pytest.raises(LayerwiseError, match="'trace'"):
        nuclear_norm(torch.ones(2, 2), "trace")
    with pytest.raises(LayerwiseError, match="probes=0"):
        nuclear_norm(torch.ones(2, 2), "lanczos", probes=0)
    with pytest.raises(LayerwiseError, match=r"\[d, 1\]"):
        nuclear_norm(torch.ones(4))
