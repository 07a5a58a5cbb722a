"""Newton-Schulz iterations `X <- (a I + b X X^T + c (X X^T)^2) X`: several ways to compute the same numbers, in a precision
that the device multiplies fast.

All work on stacks `[k, n, m]` with `n <= m` and singular values in [0, 1], and on the polynomials below.
Costs count multiplications of two n x n matrices (2 n^3 FLOP), with r = m / n and five steps:

| path          | products   | square | m = 4 n | runs on                                                      |
|---------------|------------|--------|---------|--------------------------------------------------------------|
| `standard`    | 10 r + 5   | 15     | 45      | GPUs; small matrices                                         |
| `blocked`     | 10 r + 5   | 15     | 45      | CPU, nearly square: buffers, a third of each symmetric saved |
| `gram`        | 4 r + 14   | 18     | 30      | CPU, m >= 1.5 n: buffers, a third of each symmetric saved    |
| `triton`      | 10 r + 5   | 15     | 45      | by name only: `standard`, half of each symmetric saved       |
| `triton_gram` | 4 r + 14   | 18     | 30      | by name only: `gram`, half of each symmetric saved           |

What processors do in bfloat16 is in `shifted_squares`. `docs/polar.md` has the measured times and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from layerwise.common.tensors import largest_entry
from layerwise.errors import LayerwiseError

PRECISIONS = ("auto", "float32", "bfloat16")

#: Units that multiply bfloat16, under the names that torch has for them: Intel's and AMD's, and ARM's.
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
#: On a processor smaller matrices stay in float32: a product of theirs is over before oneDNN has set one up.
BFLOAT16_FROM = 128
#: As `plain_product`: `alpha A B + beta add` into `out` (or a new tensor), where the result is known to be symmetric.
Product = Callable[..., Tensor]


class Polynomial(Protocol):
    """One step on Gram matrices `[k, n, n]`, symmetric as they are."""

    def of(self, gram: Tensor, product: Product, out: Tensor, last: bool) -> Tensor:
        """`P(G)`, in `out`; in the end `gram` is as it was, unless it is the last use of it."""


class Quintic(NamedTuple):
    """`p(s) = a s + b s^3 + c s^5` of singular values, and so `X <- P(G) X` with `P(G) = a I + b G + c G^2`, `G = X X^T`."""

    a: float
    b: float
    c: float

    def of(self, gram: Tensor, product: Product, out: Tensor, last: bool) -> Tensor:
        product(gram, gram, out, add=gram, beta=self.b, alpha=self.c)
        out.diagonal(dim1=-2, dim2=-1).add_(self.a)
        return out


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def _safe(a: float, b: float, c: float, factor: float = 1.01) -> Quintic:
    """`p(s / factor)`: room for singular values that rounding pushed above one (Polar Express, section 3.4)."""
    return Quintic(a / factor, b / factor**3, c / factor**5)


POLYNOMIALS: dict[str, tuple[Quintic, ...]] = {
    # Jordan 2024 (Muon): steep at zero, and content with singular values between 0.68 and 1.14.
    "quintic": (Quintic(3.4445, -4.7750, 2.0315),) * 5,
    # You Jiacheng 2025, one triple a step (used by dion): the same cost, singular values nearer to one.
    "quintic_tuned": (
        Quintic(4.0848, -6.8946, 2.9270),
        Quintic(3.9505, -6.3029, 2.6377),
        Quintic(3.7418, -5.5913, 2.3037),
        Quintic(2.8769, -3.1427, 1.2046),
        Quintic(2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al. 2025 (arXiv 2505.16932): minimax-optimal for singular values in [1e-3, 1]; five steps, all eight.
    "polar_express": tuple(_safe(*triple) for triple in _POLAR_EXPRESS[:5]),
    "polar_express8": (*(_safe(*triple) for triple in _POLAR_EXPRESS), Quintic(1.875, -1.25, 0.375)),
}
PATHS = ("auto", "standard", "blocked", "gram", "triton", "triton_gram")

#: Below this many rows a symmetric product by blocks is no faster (n = 320, four together: 0.96 against 0.85 of one plain).
BLOCKS_FROM = 384
#: A strip has at least so many rows, and there are at most so many strips: three at n = 384, four from 512 on.
STRIP_ROWS, MOST_STRIPS = 128, 4
#: In bfloat16 strips pay from so many entries of a factor (two threads of AVX512-BF16: 384 x 384 1.2 to 1.3, 512 x 512 1.1,
#: 384 x 1152 0.9, 768 x 768 0.8 to 0.9 of a plain product), and never on AMX, where a product is over before its factors
#: are packed (one thread, 768 x 768, two strips 1.5, four 2.0; 384 x 1536 1.1, 1.4).
HALF_STRIPS_FROM = 400_000
#: The Gram path pays from this ratio m / n: 4 r + 14 < 10 r + 5.
GRAM_FROM = 1.5
#: The Gram path takes a fresh Gram matrix after so many steps, and then after every three. Without a restart real momentum
#: matrices gave errors of 1.5e-2 in the spectral norm (float32 loses the squares of singular values below 3e-4, which five
#: steps multiply by 485). After two and not three, as Polar Express begins with the steepest steps.
RESTART_AFTER, RESTART_EVERY = 2, 3
#: What is worked on at once on a CPU: a share of a last-level cache. A few matrices together give every thread whole
#: products of its own (n = 384, four: 0.77 of one plain product where one alone takes 0.85); more fall out of the cache.
CHUNK_BYTES = 2**24


def newton_schulz(x: Tensor, steps: tuple[Quintic, ...], path: str = "auto") -> Tensor:
    """All steps on `[k, n, m]`, `n <= m`, singular values in [0, 1]. `x` may be overwritten."""
    path = choose_path(x) if path == "auto" else path
    product: Product = plain_product if path == "standard" or x.size(-2) < BLOCKS_FROM else strip_product
    if path.startswith("triton"):
        from layerwise.geometry.spectral.triton_kernels import symmetric_product as product
    if path in ("standard", "triton"):
        return _standard(x, steps, product)
    cuts = [*range(len(steps) + 1)]
    if path != "blocked":
        cuts = [0, *cuts[RESTART_AFTER:-1:RESTART_EVERY], len(steps)]
    alone = x.size(0) == 1 or x.device.type != "cpu"
    size = x.size(0) if alone else matrices_at_once(x.size(-2), x.size(-1), x.element_size())
    if size >= x.size(0):
        return on_gram_matrices(x, product(x, x.mT), steps, cuts, product)
    for chunk in x.split(size):
        chunk.copy_(on_gram_matrices(chunk, product(chunk, chunk.mT), steps, cuts, product))
    return x


def matrices_at_once(d_out: int, d_in: int, element_size: int) -> int:
    """How many matrices a CPU should work on together: as many as stay in the cache with their buffers."""
    n, m = min(d_out, d_in), max(d_out, d_in)
    return max(1, CHUNK_BYTES // max(1, (2 * n * m + 4 * n * n) * element_size))


def choose_path(x: Tensor) -> str:
    """By shape and device; see the table above. GPUs keep the standard path until the others are measured there."""
    n, m = x.shape[-2:]
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return "standard"
    medium = torch.get_float32_matmul_precision() == "medium" and bool(PROCESSOR_UNITS)
    if x.dtype == torch.float32 and medium:  # factors are rounded to bfloat16, as the user asked torch for
        return "standard"  # the Gram form with float32's restarts would lose small singular values
    if m >= GRAM_FROM * n:
        return "gram"
    return "blocked" if n >= BLOCKS_FROM else "standard"


def _standard(x: Tensor, steps: tuple[Quintic, ...], product: Product) -> Tensor:
    """As published, sums folded into the products: three launches a step, nothing for a compiler to trip over."""
    for a, b, c in steps:
        gram = product(x, x.mT)
        x = torch.baddbmm(x, product(gram, gram, add=gram, beta=b, alpha=c), x, beta=a)
    return x


def on_gram_matrices(x: Tensor, gram: Tensor, steps: Sequence[Polynomial], cuts: Sequence[int], product: Product) -> Tensor:
    """Iterate on n x n Gram matrices and touch the n x m ones only at a cut (the idea of gram-newton-schulz).

    A step takes X to `P X` and so `G = X X^T` to `P G P`; the Ps are multiplied up in Q, and all of these are polynomials of
    one G, so they commute and every product is symmetric. With a cut after every step it is the standard iteration.

    Args:
        x: `[k, n, m]`; may be overwritten.
        gram: `X X^T`; is overwritten.
        steps: in order.
        cuts: the steps that begin with a fresh Gram matrix, 0 the first, and in the end how many steps there are.
        product: multiplies what makes a symmetric matrix.
    """
    y, (p, q, spare) = torch.empty_like(x), gram.new_empty(3, *gram.shape).unbind()
    for start, end in pairwise(cuts):
        if start > 0:
            product(x, x.mT, gram)
        for step in range(start, end):
            last = step == end - 1
            new = steps[step].of(gram, product, q if step == start else p, last)
            if not last:
                product(gram, new, spare)
                product(spare, new, gram)
            if step > start:
                q, spare = product(q, p, spare), q
        if x.stride(-1) == 1:
            torch.bmm(q, x, out=y)
        else:  # a transposed one from the other side, so that memory is walked in order
            torch.bmm(x.mT, q, out=y.mT)
        x, y = y, x
    return x


def plain_product(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """All of it, by torch."""
    multiply, add_to = (torch.mm, torch.addmm) if a.ndim == 2 else (torch.bmm, torch.baddbmm)
    if add is None and alpha == 1.0:
        return multiply(a, b, out=out)
    if add is None:  # times zero it is not even read
        add, beta = a.new_empty(*a.shape[:-1], b.size(-1)) if out is None else out, 0.0
    return add_to(add, a, b, beta=beta, alpha=alpha, out=out)


def strip_product(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """The upper half by strips: strip i of the rows with the columns from its own on; what is left of it is mirrored.

    With s strips (s + 1) / 2s of the FLOPs. Against a plain product, two threads, four matrices together: n = 384, 3
    strips: 0.77 (the mirror costs 0.05 to 0.1, as torch transposes slowly), X X^T with m = 4 n: 0.76.
    """
    n = a.size(-2)
    out = a.new_empty(*a.shape[:-1], n) if out is None else out
    if a.dtype == torch.bfloat16 and (n * a.size(-1) < HALF_STRIPS_FROM or "amx_bf16" in PROCESSOR_UNITS):
        return plain_product(a, b, out, add=add, beta=beta, alpha=alpha)
    if a.dtype == torch.bfloat16 and a.ndim == 3:
        for i in range(len(a)):  # oneDNN copies strips of a stack before it multiplies them
            strip_product(a[i], b[i], out[i], add=None if add is None else add[i], beta=beta, alpha=alpha)
        return out
    strips = max(1, min(n // STRIP_ROWS, MOST_STRIPS)) if n >= BLOCKS_FROM else 1
    for top, bottom in pairwise(n * i // strips for i in range(strips + 1)):
        target = out[..., top:bottom, top:]
        part = None if add is None else add[..., top:bottom, top:]
        plain_product(a[..., top:bottom, :], b[..., top:], target, add=part, beta=beta, alpha=alpha)
        if bottom < n:
            out[..., bottom:, top:bottom].copy_(target[..., bottom - top :].mT)
    return out


# ----------------------------------------------------------------------- precision, and matrices brought into its range


def check_stack(g: Tensor) -> None:
    """Refuse what is not `[..., d_out, d_in]` of real floating-point numbers."""
    if not isinstance(g, Tensor):
        raise LayerwiseError(f"g={g!r}: expected a stack of real matrices [..., d_out, d_in], a tensor")
    if g.ndim < 2 or not g.is_floating_point():
        raise LayerwiseError(
            f"expected a stack of real matrices [..., d_out, d_in], got shape {tuple(g.shape)} of {g.dtype}; "
            "give a vector of d entries as a [d, 1] matrix"
        )


def working_dtype(g: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: what norms, sums and decompositions are computed in."""
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def iteration_dtype(g: Tensor, precision: str = "auto", gram: bool = False) -> torch.dtype:
    """The dtype that Newton-Schulz works in.

    Args:
        g: the matrices, `[..., d_out, d_in]`. Those in float64 stay in it.
        precision: one of `PRECISIONS`.
        gram: whether on a Gram path: where others have bfloat16, it has float16 on a GPU, and on a processor bfloat16 too,
            with a restart after every two steps (with float32's restarts real momentum was up to 2 off).
    """
    if g.dtype == torch.float64:
        return torch.float64
    # "auto": only where hardware multiplies it (a processor without: 28 to 49 times slower)
    pays = g.device.type == "cpu" and min(g.shape[-2:]) >= BFLOAT16_FROM and bool(PROCESSOR_UNITS)
    if g.is_cuda:
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "float32" or (precision == "auto" and not pays):
        return torch.float32
    return torch.float16 if gram and g.device.type != "cpu" else torch.bfloat16


def passes_count(x: Tensor) -> bool:
    """Whether passes over a matrix count beside its products: on processors that multiply bfloat16, eagerly."""
    return x.device.type == "cpu" and bool(PROCESSOR_UNITS) and not torch.compiler.is_compiling()


def _units() -> tuple[str, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
    else:  # before torch 2.10: of x86 alone, without a public name
        has = {"amx_bf16": torch.cpu._is_amx_tile_supported(), "avx512_bf16": torch.cpu._is_avx512_bf16_supported()}
    return tuple(unit for unit in BFLOAT16_UNITS if has.get(unit))


#: Those of `BFLOAT16_UNITS` that this processor has and torch's products use: none where torch has no oneDNN. Found at
#: import: torch.compile cannot ask for them.
PROCESSOR_UNITS = _units()


def normalised_in(g: Tensor, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """Each matrix scaled to a Frobenius norm of `size`, so that no singular value exceeds it; zero stays zero.

    Half precision only comes in the end, so that entries are rounded once.
    """
    g = g.to(torch.promote_types(dtype, torch.float32))
    if dtype == torch.bfloat16 and passes_count(g):
        norm: Tensor = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
        if ((norm > 1e-12) & (norm < 1e18)).all():
            return (g / (norm / size)).to(dtype)  # half of the passes over g
    # squares of entries beyond 1e19 or below 1e-23 would leave float32's range: the largest is divided out first
    largest = largest_entry(g, (-2, -1))
    x = g / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div_(norm.clamp_(min=1.0) / size).to(dtype)  # at least 1 (the largest entry), except for a zero matrix
