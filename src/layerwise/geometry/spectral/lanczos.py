"""A stochastic estimate of the nuclear norm, within 10 % on nearly any spectrum, from 7 readings by 8 vectors.

The nuclear norm of an n x m matrix X is `tr A^(1/2)` with `A = X X^T`. With an orthonormal block U of p random rows,
`E (n / p) tr U f(A) U^T = tr f(A)`, and Lanczos's process gives such a form without A: from the block Krylov space of U a
small matrix T comes out whose `f(T)` has, in its first block, Gauss's quadrature of it.

Two things make that useless for gradients, and each has its remedy here:

* **A few large singular values.** Whether U meets them decides everything (error 50 to 110 %). So half of the vectors find
  them, as in Hutch++ (Meyer et al., arXiv 2010.09649): what the Krylov space knows of the directions that A^2 brings
  forward is counted exactly, and the other half measures what is left; then the halves change places. The space is that of
  all vectors, so that costs no further reading (as in Chen and Hallman, arXiv 2205.01736).
* **Many small ones.** A square root is steep at zero, where few nodes lie: Gauss's rule is above the integral by up to 60 %
  on singular values spread over decades, Radau's (a node at zero) below it. Both errors shrink with every step,
  and at nearly the same rate; where they would meet is the estimate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.common.tensors import or_one, widened
from layerwise.geometry.spectral.newton_schulz import POLYNOMIALS, newton_schulz, normalised_in, passes_count

Seed = int | Tensor

#: Steps of the block Lanczos process up to 2048 rows, and above. Three are the least from which two values of a rule come
#: out; a fourth is worth more than as many readings by further probes.
STEPS, MORE_STEPS, MORE_FROM = 4, 6, 2049
#: How much faster Gauss's error shrinks than Radau's: by 0.45 (power laws) to 1.5 (white noise) times of what the same
#: rate would leave; the middle costs either at most 2 %.
RATE = 0.8
#: What is read so often should stay in the cache: a share of a last-level cache.
CHUNK_BYTES = 2**23
#: On AVX512 from so many entries on: 768 x 3072 in 0.65 of the time, 768 x 768 alone 0.85, 384 x 384 1.1, and all matrices
#: of d = 384 in a step of Lanton 1.17.
LEFT_FROM = 2**20


def steps_for(n: int) -> int:
    """How many steps a matrix of n rows is given: it is read ``2 steps - 1`` times."""
    return STEPS if n < MORE_FROM else MORE_STEPS


def nuclear_estimate(x: Tensor, square: Tensor, seed: Seed, probes: int, steps: int) -> Tensor:
    """The estimate for each of `[k, n, m]`, `n <= m`: `[k]`, in float64.

    `square` is `square_norm(x)`, between 1e-12 and 1e36; `probes` is even, and `probes * steps` at most n.
    """
    k, n, _ = x.shape
    z = _random_signs(probes, n, seed, x).expand(k, probes, n)
    chunk = k if x.device.type != "cpu" else max(1, CHUNK_BYTES // x[0].nbytes)
    pairs = zip(x.split(chunk), z.split(chunk), strict=True)
    b = torch.cat([_bidiagonalise(matrices, rows, steps) for matrices, rows in pairs])
    roots = _roots if x.device.type == "cpu" else _roots_by_products
    root, (gauss, radau, gauss_before, radau_before) = roots(b, probes)
    fall, rise = RATE * (gauss_before - gauss).clamp(min=0), (radau - radau_before).clamp(min=0)
    too_much = (gauss - radau) * fall / or_one(fall + rise) * (n / probes)
    rounding = 2 * torch.finfo(x.dtype).eps
    value = _deflated_trace(root, b @ b.mT, square, n, probes, rounding) - too_much
    return torch.minimum(torch.maximum(value, square.sqrt()), (n * square).sqrt())


def square_norm(x: Tensor) -> Tensor:
    """`||X||_F^2`, in float64 from the norms of its rows as they lie in memory: exact to a rounding of x's precision."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1 if x.stride(-1) == 1 else -2)
    return widened(norms).square().sum(-1)


def _bidiagonalise(x: Tensor, z: Tensor, steps: int) -> Tensor:
    """Block Golub-Kahan from the rows of z: B of `U X = B V`, `[k, steps * p, steps * p]` in float64.

    B is lower block bidiagonal, and as U and V have orthonormal rows, `B B^T = U A U^T` is Lanczos's T. Vectors are rows:
    on a CPU `u X` is several times faster than `X^T u` with the vectors as columns. Each block is made orthogonal to the
    one before it only, as the rest follows; what rounding brings back of older ones is not coupled to the first block.
    """
    k, p, _ = z.shape
    out = z.new_zeros(k, steps * p, steps * p, dtype=torch.float64)
    _, u = _orthonormal(z)
    v: Tensor | None = None
    for step in range(steps):
        here = slice(step * p, (step + 1) * p)
        read = few_rows(u, x)
        read = read if v is None else _without(read, v)
        if step == steps - 1:
            out[:, here, here] = _cholesky(read.double())
            break
        out[:, here, here], v = _orthonormal(read)
        below, u = _orthonormal(_without(few_rows(v, x.mT), u))
        out[:, (step + 1) * p : (step + 2) * p, here] = below.mT
    return out


def few_rows(rows: Tensor, x: Tensor) -> Tensor:
    """`rows X`; where that is faster, a transposed X from the left."""
    if x.stride(-1) == 1 or x[0].numel() < LEFT_FROM or not passes_count(x):
        return torch.bmm(rows, x)
    return torch.bmm(x.mT, rows.mT).mT.contiguous()


def _without(w: Tensor, basis: Tensor) -> Tensor:
    """The rows of w less their part in the span of orthonormal rows."""
    return torch.baddbmm(w, torch.bmm(w, basis.mT), basis, alpha=-1)


def _orthonormal(w: Tensor) -> tuple[Tensor, Tensor]:
    """`W = L Q` with orthonormal rows in Q (zero, or noise, where W has lower rank) and L lower triangular, in float64.

    In float64 a Gram matrix loses nothing that float32 rows have. Q is computed there too, or noise of a block of low
    rank would bring its large directions a second time.
    """
    rows = w.double()
    factor = _cholesky(rows)
    identity = torch.eye(w.size(-2), dtype=rows.dtype, device=w.device)
    q = torch.bmm(torch.linalg.solve_triangular(factor, identity, upper=False), rows)
    return factor, q.to(w.dtype)


def _cholesky(rows: Tensor) -> Tensor:
    """Of the Gram matrix of float64 rows. Nothing is checked, so that a GPU's host need not wait.

    What is added to the diagonal keeps a Gram matrix of low rank positive.
    """
    gram = torch.bmm(rows, rows.mT)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(1e-14 * diagonal.sum(-1, keepdim=True) + 1e-30)
    factor: Tensor = torch.linalg.cholesky_ex(gram).L
    return factor


def _leading(b: Tensor, p: int) -> list[Tensor]:
    """The parts of B whose square roots are Gauss's and Radau's rules after all steps, and after one less."""
    n = b.size(-1)
    return [b, b[:, :, : n - p], b[:, : n - p, : n - p], b[:, : n - p, : n - 2 * p]]


def _roots(b: Tensor, p: int) -> tuple[Tensor, list[Tensor]]:
    """`(B B^T)^(1/2)`, and the trace of the first block of it for each of the leading parts, by eigenvalues."""
    traces: list[Tensor] = []
    root = b
    for part in _leading(b, p):
        square, vectors = torch.linalg.eigh(finite_or_zero(part.mT @ part))
        s = square.clamp(min=0).sqrt()
        inverse = torch.where(s > 1e-9 * s[:, -1:], 1 / s, 0.0)
        if not traces:
            images = part @ vectors
            root = (images * inverse[:, None]) @ images.mT
        first = part[:, :p] @ vectors
        traces.append((first.square().sum(1) * inverse).sum(-1))
    return root, traces


def finite_or_zero(gram: Tensor) -> Tensor:
    """Zero for each Gram matrix with an entry that is none: LAPACK would raise an error, where a norm is to be nan."""
    finite = gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    return torch.where(finite[..., None, None], gram, 0.0)


def _roots_by_products(b: Tensor, p: int) -> tuple[Tensor, list[Tensor]]:
    """The same as `_roots`, where an eigendecomposition would make a GPU wait for the host.

    `(B B^T)^(1/2) = B W^T` with W the polar factor of B: a few products of tiny matrices, of all parts together.
    """
    n = b.size(-1)
    parts = torch.stack(
        [torch.nn.functional.pad(part, (0, n - part.size(-1), 0, n - part.size(-2))) for part in _leading(b, p)]
    )
    roots = parts @ exact_polar(parts).mT
    return roots[0], list(roots.diagonal(dim1=-2, dim2=-1)[..., :p].sum(-1))


def exact_polar(x: Tensor) -> Tensor:
    """The polar factor of wide matrices within 1e-5, in the precision of x (`polar` would take bfloat16 on a GPU)."""
    factor = newton_schulz(normalised_in(x, x.dtype).reshape(-1, *x.shape[-2:]), POLYNOMIALS["polar_express8"])
    return factor.reshape(x.shape)


def _deflated_trace(root: Tensor, t: Tensor, square: Tensor, n: int, p: int, rounding: float) -> Tensor:
    """Gauss's estimate of `tr A^(1/2)`, the large directions counted once: `[k]`.

    Args:
        root: `T^(1/2)`, in the basis of the Krylov space, whose first p vectors are the probes.
        t: T.
        square: `tr A = ||X||_F^2`, which is known: what the probes say of the rest of it is wrong by as much as they are,
            and is taken out of the estimate times the regression slope `m_3 / m_4` (moments of the singular values).
        n: rows of X.
        p: probes.
        rounding: less of the square than this is none.
    """
    k, half = t.size(0), p // 2
    brought_forward = (t @ t[..., :p]).mT
    _, found = _orthonormal(torch.cat([brought_forward[:, half:], brought_forward[:, :half]]))
    first = torch.eye(p, t.size(-1), dtype=t.dtype, device=t.device).expand(k, p, -1)
    z = _without(torch.cat([first[:, :half], first[:, half:]]), found)
    root, t, square = root.repeat(2, 1, 1), t.repeat(2, 1, 1), square.repeat(2)
    weight = (n - half) / z.square().sum((-2, -1))

    def trace(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1))

    z_root, z_t = z @ root, z @ t
    rest = square - trace(found @ t, found)
    rest = torch.where(rest > rounding * square, rest, 0.0)
    first_moment, second, third, fourth = (
        weight * trace(*pair) for pair in ((z, z_root), (z, z_t), (z_t, z_root), (z_t, z_t))
    )
    value = first_moment - third / or_one(fourth) * (second - rest)
    value = torch.minimum(torch.maximum(value, rest.sqrt()), ((n - half) * rest).sqrt())
    return (trace(found @ root, found) + value).reshape(2, k).mean(0)


def _random_signs(probes: int, n: int, seed: Seed, like: Tensor) -> Tensor:
    """Signs `[1 or k, probes, n]` from a hash of (seed, column): the same on every device, in every process and batch.

    One hash gives up to 32 of them, a bit each.
    """
    words = -(-probes // 32)
    bits = torch.arange(words * n, device=like.device)
    if isinstance(seed, Tensor):
        seed = seed.to(like.device, torch.int64).reshape(-1, 1)
    bits = bits + seed * 0x1E3779B1 % 0x7FFFFFFF
    # multipliers below 2^31, so that no product of 32 bits leaves int64
    for multiplier in (0x7FEB352D, 0x45D9F3B, 0x119DE1F3):
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> 16)) * multiplier
    bits = bits & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)).reshape(-1, words, 1, n)
    position = torch.arange(min(32, probes), device=like.device)[:, None]
    signs = ((bits >> position) & 1).to(like.dtype).mul_(2).sub_(1)
    return signs.reshape(-1, words * len(position), n)[:, :probes]
