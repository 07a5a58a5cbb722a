"""Which trials `rate_rule.py` runs, and why: the models, the contenders, and the studies in the order of their weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Trial:
    """One run."""

    model: str
    contender: str
    lr: float
    seed: int
    steps: int = 300
    roles: tuple[tuple[str, float], ...] = ()  # factors on the base rate, by role


@dataclass(frozen=True)
class Study:
    """Trials that answer one question."""

    question: str
    trials: tuple[Trial, ...]


DIGITS: Final[Mapping[str, Any]] = {
    "data": {"source": "digits", "validation_fraction": 0.2},
    "training": {"batch_size": 32, "eval_batches": 100},
}
FASHION: Final[Mapping[str, Any]] = {
    "data": {"source": "fashion-mnist", "validation_fraction": 0.1},
    "training": {"batch_size": 32, "eval_batches": 200},
}
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt2-tiny": {"model": "gpt2-tiny"},
    "llama-tiny": {"model": "llama-tiny"},
    "qwen3-tiny": {},  # norms on queries and keys, a tied embedding: built in `rate_rule_models.py`
    "convnet-digits": DIGITS,  # likewise
    "convnet-fashion": FASHION,
}

CONTENDERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "D-Muon": {"name": "d-muon"},
    "DualMuon": {"name": "dual-muon"},
    "the common part alone": {"name": "dual-muon", "rates": {"rule": "static", "multipliers": {}}},
}

#: D-Muon's factors of roles, and the base rates: the best of what was tried on seed 1.
LLAMA_ROLES: Final = {"embedding": 3.0, "head": 3.0, "vector": 3.0}
GPT2_ROLES: Final = {
    "embedding": 2.0,
    "head": 2.0,
    "vector": 2.0,
}  # embedding: of positions, the other one is tied
TIED_ROLES: Final = {"head": 3.0, "vector": 3.0}
DIGITS_RATES: Final = {"DualMuon": (0.004, 0.008, 0.016), "D-Muon": (0.002, 0.004, 0.008)}
FASHION_RATES: Final = {"DualMuon": (0.004, 0.008, 0.016, 0.032), "D-Muon": (0.002, 0.004, 0.008, 0.016)}


def by_role(model: str, lr: float, seed: int, factors: Mapping[str, float], steps: int = 300) -> Trial:
    """D-Muon tuned by role."""
    return Trial(model, "D-Muon", lr, seed, steps, tuple(factors.items()))


def llama(seed: int) -> tuple[Trial, ...]:
    """Each contender at its best."""
    return (
        Trial("llama-tiny", "D-Muon", 0.008, seed),
        by_role("llama-tiny", 0.008, seed, LLAMA_ROLES),
        Trial("llama-tiny", "DualMuon", 0.016, seed),
    )


def gpt2(seed: int) -> tuple[Trial, ...]:
    """Likewise."""
    return (
        Trial("gpt2-tiny", "DualMuon", 0.032, seed),
        by_role("gpt2-tiny", 0.016, seed, GPT2_ROLES),
        Trial("gpt2-tiny", "D-Muon", 0.016, seed),
    )


def qwen3(seed: int) -> tuple[Trial, ...]:
    """Likewise."""
    return (
        Trial("qwen3-tiny", "DualMuon", 0.016, seed),
        by_role("qwen3-tiny", 0.008, seed, TIED_ROLES),
        Trial("qwen3-tiny", "D-Muon", 0.008, seed),
    )


def images(model: str, rates: Mapping[str, Iterable[float]], seed: int) -> tuple[Trial, ...]:
    """Every rate of every contender."""
    return tuple(Trial(model, contender, lr, seed) for contender, tried in rates.items() for lr in tried)


STUDIES: Final[Mapping[str, Study]] = {
    "decisive": Study(
        "one rate with the rule against D-Muon with one rate and tuned by role, each at its best, on a Llama and a GPT-2"
        " (on which the rule's constants were chosen) and on a Qwen-3 (on which nothing was)",
        tuple(
            trial
            for seed in (1, 2, 0, 3, 4)
            for model in (llama, gpt2, qwen3)
            for trial in model(seed)
            if model is not qwen3 or seed in (1, 2)
        ),
    ),
    "rates": Study(
        "other base rates on the Llama (seed 1): the best rates, and how wrong one may be",
        (
            Trial("llama-tiny", "D-Muon", 0.016, 1),
            Trial("llama-tiny", "DualMuon", 0.032, 1),
            by_role("llama-tiny", 0.016, 1, LLAMA_ROLES),
            by_role("llama-tiny", 0.00566, 1, LLAMA_ROLES),
            Trial("llama-tiny", "DualMuon", 0.0113, 1),
        ),
    ),
    "fashion": Study(
        "convolutions with norms on images (Fashion-MNIST), which nothing was chosen on",
        tuple(
            trial
            for seed in (0, 1, 2)
            for trial in (
                *images("convnet-fashion", FASHION_RATES, seed),
                *(by_role("convnet-fashion", lr, seed, TIED_ROLES) for lr in (0.004, 0.008, 0.016)),
            )
        ),
    ),
    "digits": Study(
        "the same on scikit-learn's digits, 359 images held out",
        tuple(trial for seed in (0, 1, 2) for trial in images("convnet-digits", DIGITS_RATES, seed)),
    ),
    "controls": Study(
        "the Llama (seed 1) with the groups' fixed rates and no rule, and D-Muon with 1.3 times the tokens",
        (
            Trial("llama-tiny", "the common part alone", 0.016, 1),
            Trial("llama-tiny", "D-Muon", 0.008, 1, 390),
        ),
    ),
    "longer": Study(
        "the Llama at 1,000 steps (seed 1): whether the gain shrinks",
        (
            Trial("llama-tiny", "DualMuon", 0.016, 1, 1000),
            by_role("llama-tiny", 0.008, 1, LLAMA_ROLES, 1000),
            by_role("llama-tiny", 0.00566, 1, LLAMA_ROLES, 1000),
            by_role("llama-tiny", 0.004, 1, LLAMA_ROLES, 1000),
        ),
    ),
}
