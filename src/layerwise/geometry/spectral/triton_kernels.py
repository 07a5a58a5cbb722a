"""Symmetric matrix products in Triton: tiles on and above the diagonal are computed, and stored twice.

Written for GPUs and not yet measured on one, so nothing chooses it: `polar(g, path="triton")` and
`path="triton_gram"` ask for it by name. Imported only then; needs the `triton` package. With TRITON_INTERPRET=1 in the
environment before the first import the same kernel runs, slowly, on CPU tensors: that is how it is tested.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise LayerwiseError(
        "the triton paths of polar need the package triton, which is not installed; choose path='auto'"
    ) from missing

#: Rows and columns of a tile, and how much of the inner dimension is read at once; plain values for Ampere and later.
TILE, DEPTH = 128, 32
#: What the interpreter takes: small, so that a small test has tiles on, above and below the diagonal.
SMALL_TILE, SMALL_DEPTH = 32, 16


@triton.jit  # type: ignore[untyped-decorator]
def _upper_tiles(  # type: ignore[no-untyped-def]
    a, b, add, out,
    n, depth, alpha, beta,
    a_k, a_row, a_column, b_k, b_row, b_column, add_k, add_row, add_column, out_k, out_row, out_column,
    HAS_ADD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program a tile; those below the diagonal return at once."""
    row, column = tl.program_id(0), tl.program_id(1)
    if row > column:
        return
    matrix = tl.program_id(2).to(tl.int64)  # a large stack has more than 2^31 entries
    rows = row * T + tl.arange(0, T)
    columns = column * T + tl.arange(0, T)
    inner = tl.arange(0, D)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    left = a + matrix * a_k + rows[:, None] * a_row + inner[None, :] * a_column
    right = b + matrix * b_k + inner[:, None] * b_row + columns[None, :] * b_column
    total = tl.zeros((T, T), dtype=tl.float32)
    for start in range(0, depth, D):
        there = inner < depth - start
        x = tl.load(left, mask=(rows < n)[:, None] & there[None, :], other=0.0)
        y = tl.load(right, mask=there[:, None] & (columns < n)[None, :], other=0.0)
        if WIDEN:  # the interpreter multiplies with numpy, which has no bfloat16
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        left += D * a_column
        right += D * b_row
    total = total * alpha
    if HAS_ADD:
        old = add + matrix * add_k + rows[:, None] * add_row + columns[None, :] * add_column
        total += beta * tl.load(old, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    target = out + matrix * out_k
    tl.store(target + rows[:, None] * out_row + columns[None, :] * out_column, result, mask=inside)
    if row < column:
        mirrored = target + columns[None, :] * out_row + rows[:, None] * out_column
        tl.store(mirrored, result, mask=inside)


def symmetric_product(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """`alpha A B + beta add` for stacks `[k, n, m]` and `[k, m, n]` whose products are symmetric, as is `add`.

    float32 (multiplied in full precision), float16 and bfloat16 (summed in float32), any strides. `out` must not be `a`
    or `b`.

    Raises:
        LayerwiseError: for tensors on a device that Triton does not compile for, or another dtype.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (a.is_cuda or interpreted):
        raise LayerwiseError(f"the triton paths of polar run on a CUDA device, not on {a.device.type!r}; choose path='auto'")
    if a.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LayerwiseError(f"the triton paths of polar have no {a.dtype}; choose path='auto'")
    k, n, depth = a.shape
    out = a.new_empty(k, n, n) if out is None else out
    tile, inner = (SMALL_TILE, SMALL_DEPTH) if interpreted else (TILE, DEPTH)
    tiles = -(-n // tile)
    old = out if add is None else add
    options: dict[str, Any] = {} if interpreted else {"num_warps": 8, "num_stages": 3}
    _upper_tiles[tiles, tiles, k](
        a, b, old, out,
        n, depth, alpha, beta,
        *a.stride(), *b.stride(), *old.stride(), *out.stride(),
        HAS_ADD=add is not None, PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
        WIDEN=interpreted, T=tile, D=inner,
        **options,
    )  # fmt: skip
    return out
