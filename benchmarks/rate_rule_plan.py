"""Which trials `rate_rule.py` runs, and why: the models, the contenders, and the studies in the order of their weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
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
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt2-tiny": {"model": "gpt2-tiny"},
    "llama-tiny": {"model": "llama-tiny"},
    "qwen3-tiny": {},  # norms on queries and keys, a tied embedding: built in `rate_rule_models.py`
    "convnet-digits": DIGITS,  # likewise
}

CONTENDERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "AdamW": {"name": "adamw"},
    "D-Muon": {"name": "d-muon"},
    "DualMuon": {"name": "dual-muon"},
    "LANTON": {"name": "lanton"},
    "NAMO": {"name": "namo"},
    "the common part alone": {"name": "dual-muon", "rates": {"rule": "static", "multipliers": {}}},
}

#: what the AdamW groups are multiplied by in D-Muon tuned by role: the best of 1, 2, 3 and 4 on seed 1
ROLE_FACTORS: Final[Mapping[str, float]] = {"gpt2-tiny": 2.0, "llama-tiny": 3.0}


def roles(factor: float, *names: str) -> tuple[tuple[str, float], ...]:
    """One factor for the groups that AdamW updates, or for those named."""
    return tuple((name, factor) for name in names or ("embedding", "head", "vector"))


def grid(
    model: str, contender: str, rates: Iterable[float], seeds: Iterable[int], factor: float = 1.0
) -> list[Trial]:
    """Every rate on every seed."""
    given = roles(factor) if factor != 1.0 else ()
    return [Trial(model, contender, lr, seed, roles=given) for seed, lr in product(seeds, rates)]


TINY: Final = ("llama-tiny", "gpt2-tiny")
#: base rates of each contender on each model, around the best
BEST: Final[Mapping[tuple[str, str], float]] = {
    ("llama-tiny", "D-Muon"): 0.008,
    ("gpt2-tiny", "D-Muon"): 0.016,
    ("llama-tiny", "DualMuon"): 0.016,
    ("gpt2-tiny", "DualMuon"): 0.032,
}


def at_best(contender: str, seed: int, tuned: bool = False) -> list[Trial]:
    """One contender on both tiny models, D-Muon with the factors of roles where `tuned`."""
    return [
        trial
        for model in TINY
        for trial in grid(
            model, contender, [BEST[model, contender]], [seed], ROLE_FACTORS[model] if tuned else 1.0
        )
    ]


def role(model: str, lr: float, **factors: float) -> Trial:
    """DualMuon on seed 1 with factors of single roles."""
    return Trial(model, "DualMuon", lr, 1, roles=tuple(factors.items()))


def decisive(*seeds: int) -> tuple[Trial, ...]:
    return tuple(
        trial
        for seed in seeds
        for some in (at_best("DualMuon", seed), at_best("D-Muon", seed, tuned=True), at_best("D-Muon", seed))
        for trial in some
    )


STUDIES: Final[Mapping[str, Study]] = {
    "decisive": Study(
        "one rate with the rule against D-Muon with one rate and tuned by role, on the two models it was designed on",
        decisive(1, 2),
    ),
    "roles": Study(
        "whether the AdamW groups want a factor each, with the rule and for D-Muon",
        (
            role("gpt2-tiny", 0.032, vector=2.0),
            role("gpt2-tiny", 0.032, vector=0.5),
            role("llama-tiny", 0.016, vector=0.5),
            role("gpt2-tiny", 0.032, head=2.0),
            role("gpt2-tiny", 0.032, embedding=2.0),
            role("gpt2-tiny", 0.0226),
            role("llama-tiny", 0.016, embedding=2.0),
            role("llama-tiny", 0.016, head=2.0),
            Trial("gpt2-tiny", "D-Muon", 0.016, 1, roles=roles(4.0, "head")),
            Trial(
                "llama-tiny", "D-Muon", 0.008, 1, roles=(("embedding", 3.0), ("head", 6.0), ("vector", 3.0))
            ),
        ),
    ),
    "more seeds": Study("the same on seeds 0, 3 and 4", decisive(0, 3, 4)),
}
