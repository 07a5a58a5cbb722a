"""Newton-Schulz iterations `X <- (a I + b X X^T + c (X X^T)^2) X`: three ways to compute the same numbers.

All work on stacks `[k, n, m]` with `n <= m` and singular values in [0, 1], and on the polynomials below.
Costs count multiplications of two n x n matrices (2 n^3 FLOP), with r = m / n and five steps:

| path       | products          | square | m = 4 n | runs on                                              |
|------------|-------------------|--------|---------|------------------------------------------------------|
| `standard` | 10 r + 5          | 15     | 45      | GPUs; small matrices                                 |
| `blocked`  | 10 r + 5          | 15     | 45      | CPU, nearly square: buffers, half of each symmetric  |
| `gram`     | 4 r + 14          | 18     | 30      | CPU, m >= 1.5 n: buffers, half of each symmetric     |

`docs/polar.md` has the measured times and errors.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

Triple = tuple[float, float, float]

_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def _safe(triple: Triple, factor: float = 1.01) -> Triple:
    """`p(s / factor)`: room for singular values that rounding pushed above one (Polar Express, section 3.4)."""
    a, b, c = triple
    return a / factor, b / factor**3, c / factor**5


POLYNOMIALS: dict[str, tuple[Triple, ...]] = {
    # Jordan 2024 (Muon): steep at zero, and content with singular values between 0.68 and 1.14.
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
    # You Jiacheng 2025, one triple a step (used by dion): the same cost, singular values nearer to one.
    "quintic_tuned": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al. 2025 (arXiv 2505.16932): minimax-optimal for singular values in [1e-3, 1]; five steps, all eight.
    "polar_express": tuple(_safe(triple) for triple in _POLAR_EXPRESS[:5]),
    "polar_express8": (*(_safe(triple) for triple in _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
}
PATHS = ("auto", "standard", "blocked", "gram")

#: Below this many rows a symmetric product by blocks is no faster (n = 256: 0.92 of a plain one against 0.91 in pairs).
BLOCKS_FROM = 320
#: The Gram path pays from this ratio m / n: 4 r + 14 < 10 r + 5.
GRAM_FROM = 1.5
#: Steps between fresh Gram matrices. Without a restart, real momentum matrices gave errors of 1.5e-2 in the spectral
#: norm (a Gram matrix loses singular values below 3e-4, which five steps multiply by 485); with it 7e-5, standard 6e-5.
RESTART_EVERY = 3
#: What a chunk of a stack may occupy: a share of a last-level cache. Pairs of 384 x 384 take 0.95 of the time of one by
#: one, but all of a large stack at once falls out of the cache.
CHUNK_BYTES = 2**24


def newton_schulz(x: Tensor, triples: tuple[Triple, ...], path: str = "auto") -> Tensor:
    """All steps on `[k, n, m]`, `n <= m`, singular values in [0, 1]. `x` may be overwritten."""
    path = choose_path(x) if path == "auto" else path
    if path == "standard":
        return _standard(x, triples)
    steps = _gram if path == "gram" else _blocked
    size = _chunk(x)
    if size >= x.size(0):
        return steps(x, triples)
    for chunk in x.split(size):
        chunk.copy_(steps(chunk, triples))
    return x


def choose_path(x: Tensor) -> str:
    """By shape and device; see the table above. GPUs keep the standard path until the others are measured there."""
    n, m = x.shape[-2:]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return "standard"
    if m >= GRAM_FROM * n:
        return "gram"
    return "blocked" if n >= BLOCKS_FROM else "standard"


def _standard(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """As published, sums folded into the products: three launches a step, nothing for a compiler to trip over."""
    for a, b, c in triples:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _blocked(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """The standard iteration with two of its three products symmetric (n = 384: 0.94 of the time, n = 768: 0.84)."""
    k, n, _ = x.shape
    y, gram, p = torch.empty_like(x), x.new_empty(k, n, n), x.new_empty(k, n, n)
    for triple in triples:
        symmetric_product(x, x.mT, out=gram)
        _polynomial(gram, triple, out=p)
        x, y = _apply(p, x, out=y), x
    return x


def _gram(x: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """Iterate on the n x n Gram matrix and touch the n x m matrix only at a restart (the idea of gram-newton-schulz).

    With `P = a I + b G + c G^2`, a step takes X to `P X` and so `G = X X^T` to `P G P`; the Ps are multiplied up in
    Q, and all of these are polynomials of one G, so they commute and every product is symmetric.
    m = 4 n: 0.61 of the time of the standard path at n = 384.
    """
    k, n, _ = x.shape
    y = torch.empty_like(x)
    gram, p, q, spare = x.new_empty(4, k, n, n).unbind()
    for start in range(0, len(triples), RESTART_EVERY):
        segment = triples[start : start + RESTART_EVERY]
        symmetric_product(x, x.mT, out=gram)
        for step, triple in enumerate(segment):
            _polynomial(gram, triple, out=p if step else q)
            if step < len(segment) - 1:
                symmetric_product(gram, p if step else q, out=spare)
                symmetric_product(spare, p if step else q, out=gram)
            if step:
                q, spare = symmetric_product(q, p, out=spare), q
        x, y = _apply(q, x, out=y), x
    return x


def _polynomial(gram: Tensor, triple: Triple, out: Tensor) -> Tensor:
    """`a I + b G + c G^2`."""
    a, b, c = triple
    symmetric_product(gram, gram, out=out, add=gram, beta=b, alpha=c)
    out.diagonal(dim1=-2, dim2=-1).add_(a)
    return out


def symmetric_product(
    a: Tensor, b: Tensor, out: Tensor, *, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """`alpha A B + beta add` into `out`, where the result is known to be symmetric: only the upper half by blocks.

    Row strip i is multiplied with the columns from its own on; what is left of it is mirrored from above. With s strips
    (s + 1) / 2s of the FLOPs. Against a plain product, two threads: n = 384, 2 strips: 0.85 (the mirror costs 0.06 and
    smaller blocks run slower); n = 768, 4 strips: 0.73; X X^T with m = 4 n: 0.82 and 0.71.
    """
    n = out.size(-1)
    strips = 1 if n < BLOCKS_FROM else 2 if n < 640 else 4
    edges = [n * i // strips for i in range(strips + 1)]
    for top, bottom in pairwise(edges):
        rows, columns, target = a[:, top:bottom], b[:, :, top:], out[:, top:bottom, top:]
        if add is None:
            torch.bmm(rows, columns, out=target)
        else:
            torch.baddbmm(add[:, top:bottom, top:], rows, columns, beta=beta, alpha=alpha, out=target)
        out[:, bottom:, top:bottom].copy_(target[:, :, bottom - top :].mT)
    return out


def _apply(q: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """`Q X` into `out`, q symmetric; for a transposed x from the other side, so that memory is walked in order."""
    if x.stride(-1) == 1:
        torch.bmm(q, x, out=out)
    else:
        torch.bmm(x.mT, q, out=out.mT)
    return out


def _chunk(x: Tensor) -> int:
    """How many matrices of the stack are worked on at once: as many as stay in the cache with their buffers."""
    _, n, m = x.shape
    return max(1, CHUNK_BYTES // ((2 * n * m + 4 * n * n) * x.element_size()))
