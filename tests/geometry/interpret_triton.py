"""Run by test_triton_kernels.py with TRITON_INTERPRET=1: errors of the kernel against float64 products, as JSON."""

import json

import torch

from layerwise.geometry import polar
from layerwise.geometry.spectral.triton_kernels import symmetric_product


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = {}
    # smaller than a tile, one tile, tiles cut at both edges, and an inner dimension shorter than what is read at once
    for n, m in ((5, 7), (32, 32), (65, 100), (70, 33), (96, 200)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, n, m, generator=generator).to(dtype)
            truth = x.double() @ x.double().mT
            errors[f"{n} x {m} {dtype} X X^T"] = relative(symmetric_product(x, x.mT), truth)
            a = (truth / m).to(dtype)
            b = (a.double() @ a.double() / 4).to(dtype)  # commutes with a, up to rounding
            out = torch.full((2, n, n), torch.nan, dtype=dtype)
            product = symmetric_product(a, b.mT, out, add=a, beta=0.5, alpha=-2.0)
            errors[f"{n} x {m} {dtype} b add + a A B"] = relative(product, 0.5 * a.double() - 2 * a.double() @ b.double())
    x = torch.randn(2, 130, 70, generator=generator)
    for path in ("triton", "triton_gram"):
        errors[path] = relative(polar(x, path=path), polar(x.double()))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
