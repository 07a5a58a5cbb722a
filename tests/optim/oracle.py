"""A slow, literal twin of the algorithm: one matrix at a time, float64, SVD. Written from the papers, not from the code.

It shares nothing with the package but the names of the matrices. Weights and gradients are NumPy arrays of
[d_out, d_in] (vectors: [d]); a fused projection is as many entries as it has parts.
"""

from __future__ import annotations

import math

import numpy as np


def polar(m: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    keep = s > s.max(initial=0.0) * max(m.shape) * np.finfo(np.float64).eps
    return (u * keep) @ vt


def nuclear(m: np.ndarray) -> float:
    return float(np.linalg.svd(m, compute_uv=False).sum())


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, to nearest and ties to even, by the bits of a float32."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def weighted_median(pairs: list[tuple[float, int]]) -> float:
    """The value at which half of the weight lies at it or below."""
    half, below = sum(weight for _, weight in pairs) / 2, 0
    for value, weight in sorted(pairs):
        below += weight
        if below >= half:
            return value
    raise AssertionError("no weights")


class Lanton:
    """LANTON on a dict of arrays.

    `kinds`: "hidden" (matrix), "embedding" (sign), "head" (sign / d_in) or "vector"; the matrices of one kind have
    their noise compared with one another.
    """

    def __init__(
        self,
        weights,
        kinds,
        *,
        lr,
        momentum,
        weight_decay,
        alpha,
        beta,
        anchor="max",
        reference="previous",
        normalised=False,
        scaling="rms_0.2",
        floor=0.1,
        group_alpha=0.0,
        nesterov=False,
    ):
        self.w = {k: np.array(v, dtype=np.float64) for k, v in weights.items()}
        self.kinds, self.lr, self.momentum, self.wd = kinds, lr, momentum, weight_decay
        self.alpha, self.beta, self.anchor, self.reference = alpha, beta, anchor, reference
        self.normalised, self.scaling, self.floor, self.nesterov = normalised, scaling, floor, nesterov
        self.group_alpha = group_alpha
        self.m = {k: np.zeros_like(v) for k, v in self.w.items()}
        self.history: dict[str, list[np.ndarray]] = {k: [] for k in self.w}
        self.h: dict[str, float] = {}
        self.multiplier = dict.fromkeys(self.w, 1.0)

    def dual(self, name, d):
        kind = self.kinds[name]
        if kind == "hidden":
            out, inn = d.shape
            value = math.sqrt(out / inn) * nuclear(d)
            white = math.sqrt(out / inn) * min(out, inn) * math.sqrt(max(out, inn))
        elif kind == "embedding":
            value, white = np.abs(d).sum(), math.sqrt(2 / math.pi) * d.size
        elif kind == "head":
            value, white = np.abs(d).sum() / d.shape[1], math.sqrt(2 / math.pi) * d.shape[0]
        else:
            value, white = math.sqrt(d.size) * np.linalg.norm(d), d.size
        return value / white if self.normalised else value

    def direction(self, name, u):
        kind = self.kinds[name]
        if not u.any():
            return np.zeros_like(u)
        if kind == "hidden":
            out, inn = u.shape
            scale = math.sqrt(out / inn) if self.scaling == "unit" else 0.2 * math.sqrt(max(out, inn))
            return scale * polar(u)
        if kind == "embedding":
            return np.sign(u) * (1.0 if self.scaling == "unit" else 0.2)
        if kind == "head":
            return np.sign(u) * (1.0 / u.shape[1] if self.scaling == "unit" else 0.2)
        return u / math.sqrt((u**2).mean()) * (1.0 if self.scaling == "unit" else 0.2)

    def difference(self, name, g, halves):
        """G - G', brought to the variance 2 sigma^2 that two gradients of noise sigma^2 each would have."""
        if self.reference == "independent":
            first, second = halves[name]  # means over half batches: noise 2 sigma^2 each
            return math.sqrt(1 / 2) * (first - second)
        past = self.history[name]
        if not past:
            return None
        if self.reference == "previous":
            return g - past[-1]
        if self.reference == "previous_bf16":
            return g - to_bfloat16(past[-1])
        # "momentum": the exponential average of all gradients before this one, its weights summing to one
        weights = np.array([self.momentum**age for age in range(len(past))][::-1])
        weights /= weights.sum()
        average = sum(weight * gradient for weight, gradient in zip(weights, past, strict=True))
        return math.sqrt(2 / (1 + (weights**2).sum())) * (g - average)

    def step(self, grads, halves=None):
        """One step; a matrix that `grads` does not name has no gradient."""
        for name, g in grads.items():
            d = self.difference(name, g, halves)
            if d is not None:
                square = self.dual(name, d) ** 2
                first = name not in self.h
                self.h[name] = square if first else self.beta * self.h[name] + (1 - self.beta) * square
            self.history[name].append(g.copy())
            self.m[name] = self.momentum * self.m[name] + (1 - self.momentum) * g
        for kind in set(self.kinds.values()):
            mates = [name for name in self.h if self.kinds[name] == kind]
            if mates:
                self.compare(mates)
        for name, g in grads.items():
            u = self.momentum * self.m[name] + (1 - self.momentum) * g if self.nesterov else self.m[name]
            step = self.lr * self.multiplier[name] * self.direction(name, u)
            decay = 0.0 if self.kinds[name] in ("vector", "embedding") else self.wd  # of positions alone
            self.w[name] = self.w[name] * (1 - self.lr * decay) - step

    def compare(self, mates):
        if self.alpha > 0:
            a = {n: self.alpha / math.sqrt(self.alpha**2 + self.h[n]) for n in mates}
        else:
            self.multiplier |= dict.fromkeys(mates, 1.0)
            mates = [n for n in mates if self.h[n] > 0]
            if not mates:
                return
            median = weighted_median([(self.h[n], self.w[n].size) for n in mates])
            if self.group_alpha:
                a = {n: 1 / math.sqrt(self.h[n] + self.group_alpha**2 * median) for n in mates}
            else:
                a = {n: 1 / math.sqrt(max(self.h[n], self.floor * median)) for n in mates}
        reference = max(a.values()) if self.anchor == "max" else sum(a.values()) / len(a)
        for n in mates:
            self.multiplier[n] = math.sqrt(a[n] / reference)


def dual_and_step(geometry: str, u: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Dual norm, unit step of steepest ascent and dual norm of white noise, of a matrix in one geometry."""
    out, inn = u.shape
    if geometry == "spectral":
        scale = math.sqrt(out / inn)
        return scale * nuclear(u), scale * polar(u), scale * min(out, inn) * math.sqrt(max(out, inn))
    if geometry == "conv":  # taps = 3
        scale = math.sqrt(3 * out / inn) / 3
        return scale * nuclear(u), scale * polar(u), scale * min(out, inn) * math.sqrt(max(out, inn))
    if geometry == "sign":
        return np.abs(u).sum(), np.sign(u), math.sqrt(2 / math.pi) * u.size
    if geometry == "sign_per_input":
        return np.abs(u).sum() / inn, np.sign(u) / inn, math.sqrt(2 / math.pi) * out
    axis = {"row": 1, "column": 0}.get(geometry)
    lengths = np.sqrt((u**2).sum(axis=axis, keepdims=True))
    unit = u / np.where(lengths > 0, lengths, 1.0)
    length = {
        "row": 1 / math.sqrt(inn),
        "column": math.sqrt(out),
        "frobenius": 1.0,
        "vector": math.sqrt(u.size),
    }[geometry]
    white = {"row": out, "column": u.size, "frobenius": math.sqrt(u.size), "vector": u.size}[geometry]
    return length * lengths.sum(), length * unit, white


class DualNormRates:
    """Steps of norm one at rates by the dual norms of the steps before, on a dict of matrices in one geometry."""

    def __init__(self, weights, geometry, *, lr, momentum, nesterov, softening, beta, every):
        self.w = {name: np.array(w, dtype=np.float64) for name, w in weights.items()}
        self.geometry, self.lr, self.momentum, self.nesterov = geometry, lr, momentum, nesterov
        self.softening, self.beta, self.every, self.steps = softening, beta, every, 0
        self.m = {name: np.zeros_like(w) for name, w in self.w.items()}
        self.h: dict[str, float] = {}
        self.multiplier = dict.fromkeys(self.w, 1.0)

    def step(self, grads):
        for name, g in grads.items():
            self.m[name] = self.momentum * self.m[name] + (1 - self.momentum) * g
            u = self.momentum * self.m[name] + (1 - self.momentum) * g if self.nesterov else self.m[name]
            dual, step, white = dual_and_step(self.geometry, u)
            self.w[name] = self.w[name] - self.lr * self.multiplier[name] * step
            square = (dual / white) ** 2
            if self.steps % self.every != 0:
                continue
            if self.h.get(name, 0.0) == 0.0:
                self.h[name] = square
            else:
                self.h[name] = self.beta * self.h[name] + (1 - self.beta) * square
        median = weighted_median([(h, self.w[name].size) for name, h in self.h.items() if h > 0])
        for name, h in self.h.items():
            if h > 0:
                ratio = (1 + self.softening) * median / (self.softening * median + h)
                self.multiplier[name] = ratio**0.25
        self.steps += 1
