"""The precision that Newton-Schulz runs in (what the device multiplies fastest, unless the caller says otherwise), and
matrices brought into its range."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.common.tensors import or_one

PRECISIONS = ("auto", "float32", "bfloat16")

#: Units that multiply bfloat16, under the names that torch has for them: Intel's and AMD's, and ARM's.
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
#: On a processor smaller matrices stay in float32: a product of theirs is over before oneDNN has set one up.
BFLOAT16_FROM = 128


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
    pays = g.device.type == "cpu" and min(g.shape[-2:]) >= BFLOAT16_FROM and bool(processor_units())
    if g.is_cuda:
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "float32" or (precision == "auto" and not pays):
        return torch.float32
    return torch.float16 if gram and g.device.type != "cpu" else torch.bfloat16


def rounds_factors(x: Tensor) -> bool:
    """Whether a processor multiplies float32 in bfloat16, as the user asked torch for "medium" precision."""
    medium = torch.get_float32_matmul_precision() == "medium" and bool(processor_units())
    return x.dtype == torch.float32 and medium


def passes_count(x: Tensor) -> bool:
    """Whether passes over a matrix count beside its products: on processors that multiply bfloat16, eagerly."""
    return x.device.type == "cpu" and bool(processor_units()) and not torch.compiler.is_compiling()


def has_tiles() -> bool:
    """Whether a processor's bfloat16 products run on AMX, where strips of a symmetric one never pay."""
    return "amx_bf16" in processor_units()


def processor_units() -> tuple[str, ...]:
    """Those of `BFLOAT16_UNITS` that this processor has and torch's products use: none where torch has no oneDNN."""
    return _UNITS  # found at import: torch.compile cannot ask for them


def _units() -> tuple[str, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    if hasattr(torch.cpu, "get_capabilities"):  # from torch 2.11 on
        has = torch.cpu.get_capabilities()
        return tuple(unit for unit in BFLOAT16_UNITS if has.get(unit))
    return ("avx512_bf16",) if torch.cpu._is_avx512_bf16_supported() else ()


_UNITS = _units()


def largest_entry(g: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """`max |g|` over dim, which is kept. A maximum and a minimum take a tenth of the time of a norm of order infinity."""
    return torch.maximum(g.amax(dim, keepdim=True), -g.amin(dim, keepdim=True))


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
    x = g / or_one(largest_entry(g))
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div_(norm.clamp_(min=1.0) / size).to(dtype)  # at least 1 (the largest entry), except for a zero matrix
