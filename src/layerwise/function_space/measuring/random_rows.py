"""Random numbers that depend on a seed, a probe and the row they are for, and on nothing else.

A generator's stream would have to be drawn from its beginning by every process, and differs between devices. Here the
64 bits at place j of row i are SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014) at a counter, so that
any rows of the global batch can be drawn anywhere. Integer arithmetic wraps around, as the function is defined to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WEYL = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def random_words(key: tuple[int, ...], rows: range, width: int, device: torch.device) -> Tensor:
    """`[rows, width]` independent 64-bit words (int64), given by `key`, the number of the row and the place in it."""
    state = torch.zeros(1, dtype=torch.int64, device=device)
    for part in key:
        state = _mixed(state + (part % 2**64 - (part % 2**64 >> 63) * 2**64)) + _WEYL
    numbers = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device)
    starts = _mixed(state + numbers * _WEYL)
    return _mixed(starts[:, None] + torch.arange(1, width + 1, dtype=torch.int64, device=device) * _WEYL)


def random_signs(key: tuple[int, ...], rows: range, like: Tensor) -> Tensor:
    """Independent +1 and -1 in the shape and dtype of `like`, whose first dimension are these rows: one from each bit."""
    width = math.prod(like.shape[1:])
    bytes_ = random_words(key, rows, -(-width // 64), like.device).view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=like.device)
    bits = (bytes_[:, :, None] >> shifts & 1).flatten(1)[:, :width]
    return bits.to(like.dtype).mul_(2).sub_(1).reshape(like.shape)


def random_normals(key: tuple[int, ...], rows: range, like: Tensor) -> Tensor:
    """Independent standard normal numbers in the shape and dtype of `like`: two from each word (Box and Muller)."""
    width = math.prod(like.shape[1:])
    words = random_words(key, rows, -(-width // 2), like.device)
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    radius = ((words >> 32 & 0xFFFFFFFF).to(wide) + 0.5).div_(2**32).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFFFF).to(wide).mul_(2 * math.pi / 2**32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :width].to(like.dtype).reshape(like.shape)


def _mixed(z: Tensor) -> Tensor:
    # int64 shifts copy the sign bit, so the masks make them logical ones.
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return z ^ (z >> 31 & 0x1FFFFFFFF)
