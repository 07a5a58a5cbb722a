"""Which trials `rate_rule.py` runs, and why: the models, the contenders, and the studies in the order of their weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rate_rule_rivals import by_kind, by_unit


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
#: 5.5 million parameters
LLAMA_SMALL: Final[Mapping[str, Any]] = {
    "preset": "llama-tiny",
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
#: Adapters on a GPT-2 of two blocks that has read Python's source, to read Python's manual (`benchmarks/transfer`).
LORA: Final[Mapping[str, Any]] = {
    "model": {
        "preset": "gpt2-tiny",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 2,
        "start": "runs/transfer/pretrained",
        "lora": {"rank": 8, "alpha": 8, "targets": ["c_attn", "c_fc", "c_proj"]},
    },
    "data": {
        "source": "files",
        "paths": ["runs/transfer/manual.txt"],
        "tokenizer": "byte",
        "seq_len": 64,
    },
    "training": {"eval_batches": 16},
}
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt2-tiny": {"model": "gpt2-tiny"},
    "llama-tiny": {"model": "llama-tiny"},
    "llama-tiny, batch 8": {"model": "llama-tiny", "training": {"batch_size": 8, "eval_batches": 16}},
    "llama-tiny, batch 64": {"model": "llama-tiny", "training": {"batch_size": 64, "eval_batches": 2}},
    "llama-small": {"model": LLAMA_SMALL},
    "gpt2-lora": LORA,
    "qwen3-tiny": {},  # norms on queries and keys, a tied embedding: built in `rate_rule_models.py`
    "convnet-digits": DIGITS,  # likewise
    "convnet-fashion": FASHION,
}
#: Processor time of a training step where no result says it: two cores of an AMD EPYC of 2021 (AVX2), busy.
SECONDS_A_STEP: Final[Mapping[str, float]] = {
    "gpt2-tiny": 0.37,
    "llama-tiny": 0.35,
    "llama-tiny, batch 8": 0.19,
    "llama-tiny, batch 64": 1.3,
    "llama-small": 1.4,
    "gpt2-lora": 0.04,
    "qwen3-tiny": 0.35,
    "convnet-digits": 0.02,
    "convnet-fashion": 0.02,
}
#: What a contender's step takes of that, where it is much more: torch's Muon works in bfloat16, slow on that processor.
TIMES: Final[Mapping[str, float]] = {"torch's Muon": 2.9}

#: The rule as it was: a norm at every step, in place of every fourth.
AT_EVERY_STEP: Final = {"rule": "dual_norm_adaptive", "beta": 0.95, "every": 1}
#: DualMuon as it was: that, its momentum at 0.95 from the first step on, and AdamW for the rest.
BEFORE: Final = {"name": "dual-muon", "momentum_warmup": 0, "adamw_nu": 1.0, "rates": AT_EVERY_STEP}
CONTENDERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "D-Muon": {"name": "d-muon"},
    "DualMuon": {"name": "dual-muon"},
    "DualMuon, norms at every step": {"name": "dual-muon", "rates": AT_EVERY_STEP},
    "DualMuon, norms at every step, head x 4.5": {"name": "dual-muon", "rates": AT_EVERY_STEP, "head": 4.5},
    "DualMuon, plain AdamW": {"name": "dual-muon", "adamw_nu": 1.0, "rates": AT_EVERY_STEP},
    "DualMuon, no warm-up": BEFORE,
    # D-Muon with that frame, and with the warm-up alone
    "frame on D-Muon": {
        "name": "dual-muon",
        "radius": 1.0,
        "head": 1.0,
        "rates": {"rule": "static", "multipliers": {}},
    },
    "warm-up on D-Muon": {
        "name": "dual-muon",
        "adamw_nu": 1.0,
        "radius": 1.0,
        "head": 1.0,
        "rates": {"rule": "static", "multipliers": {}},
    },
    # other constants; the head's was 2 before
    "DualMuon, head x 1.5": {**BEFORE, "head": 1.5},
    "DualMuon, head x 2": {**BEFORE, "head": 2.0},
    "DualMuon, head x 4.5": {**BEFORE, "head": 4.5},
    "DualMuon, head x 2, softening 0.03": {
        **BEFORE,
        "head": 2.0,
        "rates": {**AT_EVERY_STEP, "softening": 0.03},
    },
    "DualMuon, head x 2, softening 0.3": {
        **BEFORE,
        "head": 2.0,
        "rates": {**AT_EVERY_STEP, "softening": 0.3},
    },
    # the rule as it is, with less of the frame or with other multipliers
    "DualMuon, without the frame": {"name": "dual-muon", "momentum_warmup": 0, "adamw_nu": 1.0},
    "DualMuon, the warm-up alone": {"name": "dual-muon", "adamw_nu": 1.0},
    "DualMuon, all multipliers at 1": {"name": "dual-muon", "rates": {"rule": "static", "multipliers": {}}},
    "DualMuon, permuted": {"name": "dual-muon", "rates": {"rule": "permuted_dual_norm"}},
    "the common part alone, head x 2": {
        **BEFORE,
        "head": 2.0,
        "rates": {"rule": "static", "multipliers": {}},
    },
    "the common part alone": {**BEFORE, "rates": {"rule": "static", "multipliers": {}}},
    # of the frame: weight of the old average, decay, and AdamW's second average
    "DualMuon, momentum 0.9": {**BEFORE, "momentum": 0.9},
    "DualMuon, momentum 0.8": {**BEFORE, "momentum": 0.8},
    "DualMuon, no decay": {**BEFORE, "weight_decay": 0.0},
    "DualMuon, AdamW's beta 0.99": {**BEFORE, "adamw_betas": [0.9, 0.99]},
    "momentum 0.9 on D-Muon": {"name": "d-muon", "momentum": 0.9},
    "AdamW": {"name": "adamw"},
    "torch's Muon": {"name": "torch-muon"},
    "NAMO": {"name": "namo"},
    "LANTON": {"name": "lanton"},
    "LANTON's noise on D-Muon": {
        "name": "d-muon",
        # the paper's formula with alpha^2 = 0.1 of the group's median, as the rule has it
        "rates": {"rule": "noise_adaptive", "size_normalised": True, "group_alpha": 0.316},
    },
    "Scion": {"name": "scion"},
    "the step's norm on Scion": {"name": "scion", "rates": AT_EVERY_STEP},
    "UpdateFloor(0.35)": {"name": "d-muon", "weight_decay": 0.0, "rates": {"rule": "update_floor"}},
    "MuonMax-Momo": {"name": "muonmax-momo"},
    "DualMuon, multipliers permuted": {**BEFORE, "rates": {**AT_EVERY_STEP, "rule": "permuted_dual_norm"}},
    # as pytorch-optimizer ships them
    "NorMuon": {"name": "nor-muon"},
    "AdaMuon": {"name": "ada-muon"},
    "SOAP": {"name": "soap"},
    "LAMB": {"name": "lamb"},
    "Adam-mini": {"name": "adam-mini"},
    "Prodigy": {"name": "prodigy"},
    "frame on AdaMuon": {"name": "framed-ada-muon"},
}
#: What DualMuon was, last and before that.
EVERY_STEP: Final = "DualMuon, norms at every step"
PLAIN_ADAMW: Final = "DualMuon, plain AdamW"
NO_WARM_UP: Final = "DualMuon, no warm-up"
#: DualMuon with multipliers that stand still: of which form of it, and what is made of their means over its run on the same
#: model at the same rate, seed and length, which is trained first where no result holds it.
FROZEN: Final[Mapping[str, tuple[str, Callable[[Mapping[str, float]], dict[str, float]]]]] = {
    "DualMuon, multipliers frozen by unit": (NO_WARM_UP, by_unit),
    "DualMuon, multipliers frozen by kind": (NO_WARM_UP, by_kind),
    "DualMuon, still by unit": ("DualMuon", by_unit),
    "DualMuon, still by kind": ("DualMuon", by_kind),
}

#: Constants, base rates and factors of roles were chosen on these seeds, which no table of losses uses. The first rates of
#: D-Muon and its factors by role were chosen earlier, on seed 1.
TUNING_SEEDS: Final = (11, 12)
THREE_TIMES: Final = {"embedding": 3.0, "head": 3.0, "vector": 3.0}
TWICE: Final = {"embedding": 2.0, "head": 2.0, "vector": 2.0}
LLAMA_ROLES: Final = THREE_TIMES
#: The best at 1,000 steps.
LLAMA_ROLES_LONGER: Final = {"embedding": 4.0, "head": 2.0}
GPT2_ROLES: Final = TWICE  # embedding: of positions, the other one is tied
#: With the rate that `DualMuon` gives the head.
LLAMA_ROLES_HEAD_6: Final = {**THREE_TIMES, "head": 6.0}
#: What a search over three seeds found, one role after the other (study `searched`).
LLAMA_ROLES_SEARCHED: Final = {"embedding": 8.0, "head": 4.0}
#: What the study `factors` found. Of the embeddings, one is tied to the head: the factor is that of the positions.
GPT2_ROLES_SEARCHED: Final = {**GPT2_ROLES, "head": 4.0}
TIED_ROLES: Final = {"head": 3.0, "vector": 3.0}
DIGITS_RATES: Final = {
    "DualMuon": (0.001, 0.002, 0.004, 0.008, 0.016),
    "D-Muon": (0.001, 0.002, 0.004, 0.008),
}
FASHION_RATES: Final = {"DualMuon": (0.004, 0.008, 0.016, 0.032), "D-Muon": (0.002, 0.004, 0.008, 0.016)}


def by_role(model: str, lr: float, seed: int, factors: Mapping[str, float], steps: int = 300) -> Trial:
    """D-Muon tuned by role."""
    return Trial(model, "D-Muon", lr, seed, steps, tuple(factors.items()))


def llama(seed: int) -> tuple[Trial, ...]:
    """Each contender at its best."""
    return (
        Trial("llama-tiny", "D-Muon", 0.008, seed),
        by_role("llama-tiny", 0.008, seed, LLAMA_ROLES),
        by_role("llama-tiny", 0.008, seed, LLAMA_ROLES_HEAD_6),
        Trial("llama-tiny", "DualMuon", 0.016, seed),
    )


def gpt2(seed: int) -> tuple[Trial, ...]:
    """Likewise."""
    return (
        Trial("gpt2-tiny", "DualMuon", 0.016, seed),
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


#: Of each model and length the base rates, and the seeds of each rate.
Tried = tuple[tuple[str, int, tuple[float, ...], Iterable[int]], ...]
#: Every form of `DualMuon` is tried on the images in the same way.
IMAGES: Final[Tried] = (
    ("convnet-fashion", 300, FASHION_RATES["DualMuon"], range(3)),
    ("convnet-digits", 300, DIGITS_RATES["DualMuon"], range(3)),
)


def each_of(contender: str, tried: Tried) -> tuple[Trial, ...]:
    """Every seed of every rate."""
    return tuple(
        Trial(model, contender, lr, seed, steps) for model, steps, rates, seeds in tried for lr in rates for seed in seeds
    )


def every_step() -> tuple[Trial, ...]:
    """`DualMuon` with a norm at every step."""
    tried: Tried = (
        ("llama-tiny", 300, (0.016,), range(5)),
        ("llama-tiny", 300, (0.008, 0.0113, 0.032, 0.064), (1,)),
        ("gpt2-tiny", 300, (0.016,), range(5)),
        ("gpt2-tiny", 300, (0.008, 0.032, 0.064), (1,)),
        ("qwen3-tiny", 300, (0.016,), range(3)),
        ("qwen3-tiny", 300, (0.008, 0.032), (1,)),
        ("llama-tiny", 1000, (0.0113,), range(5)),
        ("gpt2-tiny", 1000, (0.0113,), (1,)),
        ("llama-small", 1000, (0.008,), (1,)),
        ("llama-tiny, batch 8", 300, (0.016,), (1,)),
        ("llama-tiny, batch 64", 200, (0.016, 0.032), (1,)),
        ("gpt2-lora", 300, (0.008, 0.016, 0.032, 0.064, 0.128), range(3)),
        *IMAGES,
    )
    return each_of(EVERY_STEP, tried)


def constants() -> tuple[Trial, ...]:
    """Vectors and head at other rates, in today's frame, on the tuning seeds."""
    head = "DualMuon, norms at every step, head x 4.5"
    tried = (("llama-tiny", 11), ("llama-tiny", 12), ("gpt2-tiny", 11), ("qwen3-tiny", 11))
    return (
        *(
            Trial(model, EVERY_STEP, 0.016, seed, roles=roles)
            for model, seed in tried
            for roles in ((), (("vector", 0.5),), (("vector", 0.25),))
        ),
        *(Trial(model, head, 0.016, seed) for model, seed in tried[:3]),
        Trial("llama-tiny", EVERY_STEP, 0.016, 11, roles=(("vector", 2.0),)),
    )


def no_warm_up() -> tuple[Trial, ...]:
    """`DualMuon` as it was, on every model."""
    tried: Tried = (
        ("llama-tiny", 300, (0.016,), range(5)),
        ("llama-tiny", 300, (0.0113, 0.032), (1,)),
        ("llama-tiny", 1000, (0.0113, 0.016), range(3)),
        ("gpt2-tiny", 300, (0.016,), range(5)),
        ("gpt2-tiny", 1000, (0.0113, 0.016), (1,)),
        ("qwen3-tiny", 300, (0.016,), range(3)),
        ("llama-small", 1000, (0.008, 0.0113), (1,)),
        ("llama-tiny, batch 8", 300, (0.008, 0.016), (1,)),
        ("llama-tiny, batch 64", 200, (0.016, 0.032), (1,)),
        ("gpt2-lora", 300, (0.008, 0.016, 0.032, 0.064, 0.128), range(3)),
        *IMAGES,
    )
    return each_of(NO_WARM_UP, tried)


def plain_adamw() -> tuple[Trial, ...]:
    """`DualMuon` before its AdamW groups were quasi-hyperbolic. Adapters have none of them: their runs are `DualMuon`'s."""
    tried: Tried = (
        ("llama-tiny", 300, (0.016,), range(5)),
        ("llama-tiny", 300, (0.0113, 0.032), (1,)),
        ("llama-tiny", 1000, (0.0113,), range(3)),
        ("llama-tiny", 1000, (0.016,), (1,)),
        ("gpt2-tiny", 300, (0.016,), range(5)),
        ("gpt2-tiny", 1000, (0.016,), (1,)),
        ("qwen3-tiny", 300, (0.016,), range(3)),
        ("llama-small", 1000, (0.008,), (1,)),
        ("llama-tiny, batch 8", 300, (0.008, 0.016), (1,)),
        ("llama-tiny, batch 64", 200, (0.032,), (1,)),
        *IMAGES,
    )
    return each_of(PLAIN_ADAMW, tried)


def warm_up_for_all(name: str = "warm-up on D-Muon") -> tuple[Trial, ...]:
    """D-Muon, tuned by role, with the warm-up of momentum that `DualMuon` has."""
    searched, longer, gpt2 = (
        tuple(factors.items()) for factors in (LLAMA_ROLES_SEARCHED, LLAMA_ROLES_LONGER, GPT2_ROLES_SEARCHED)
    )
    return (
        *(Trial("llama-tiny", name, 0.008, seed, roles=searched) for seed in (1, 2, 0, 3, 4)),
        *(Trial("gpt2-tiny", name, 0.016, seed, roles=gpt2) for seed in (1, 2, 0, 3, 4)),
        *(Trial("llama-tiny", name, 0.00566, seed, 1000, longer) for seed in (1, 0, 2)),
        Trial("gpt2-tiny", name, 0.00566, 1, 1000, gpt2),
        Trial("llama-small", name, 0.004, 1, 1000, longer),
        Trial("llama-tiny, batch 8", name, 0.008, 1, roles=searched),
        Trial("llama-tiny, batch 64", name, 0.016, 1, 200, searched),
    )


def parts() -> tuple[Trial, ...]:
    """The rule as it is, with less of the frame, and in the frame with multipliers that are not the layers' own."""
    part = ("DualMuon, without the frame", "DualMuon, the warm-up alone")
    control = ("DualMuon, all multipliers at 1", "DualMuon, permuted")
    tried = (("llama-tiny", part, 5), ("llama-tiny", control, 5), ("gpt2-tiny", part, 5), ("gpt2-tiny", control, 3))
    other_rates = (
        ("llama-tiny", (0.008, 0.0113, 0.032), (1,)),
        ("llama-tiny", (0.0226,), range(5)),
        ("gpt2-tiny", (0.0113, 0.032), (1,)),
        ("gpt2-tiny", (0.0226,), range(3)),
    )
    return (
        *(
            Trial(model, contender, 0.016, seed)
            for model, contenders, seeds in tried
            for seed in range(seeds)
            for contender in contenders
        ),
        *(Trial(model, control[0], lr, seed) for model, rates, seeds in other_rates for seed in seeds for lr in rates),
        *(Trial("llama-tiny", f"DualMuon, still by {which}", 0.016, 1) for which in ("unit", "kind")),
    )


def llama_seeds(
    seeds: Iterable[int], lr: float, tuned_lr: float, factors: Mapping[str, float], steps: int
) -> tuple[Trial, ...]:
    """Each at its best rate, on seeds that decided nothing: neither rates and factors nor the rule's constants."""
    roles = tuple(factors.items())
    return tuple(
        trial
        for seed in seeds
        for trial in (
            Trial("llama-tiny", "DualMuon", lr, seed, steps),
            *(Trial("llama-tiny", name, tuned_lr, seed, steps, roles) for name in ("D-Muon", "frame on D-Muon")),
        )
    )


def tuning() -> tuple[Trial, ...]:
    """What was tried on the tuning seeds."""
    two = "DualMuon, head x 2"
    halved = (("vector", 0.5),)
    return (
        *(Trial("llama-tiny", two, lr, 11) for lr in (0.0113, 0.016, 0.0226)),
        *(Trial("llama-tiny", two, lr, 12) for lr in (0.0113, 0.016)),
        Trial("llama-tiny", two, 0.016, 11, roles=halved),
        Trial("llama-tiny", f"{two}, softening 0.03", 0.016, 11),
        Trial("llama-tiny", f"{two}, softening 0.3", 0.016, 11),
        *(Trial("llama-tiny", NO_WARM_UP, lr, 11) for lr in (0.0113, 0.016)),
        Trial("llama-tiny", NO_WARM_UP, 0.016, 12),
        Trial("llama-tiny", "DualMuon, head x 4.5", 0.0113, 11),
        by_role("llama-tiny", 0.008, 11, LLAMA_ROLES),
        by_role("llama-tiny", 0.008, 11, LLAMA_ROLES_HEAD_6),
        *(Trial("gpt2-tiny", two, lr, 11) for lr in (0.016, 0.0226, 0.032)),
        Trial("gpt2-tiny", two, 0.032, 11, roles=halved),
        Trial("gpt2-tiny", f"{two}, softening 0.03", 0.032, 11),
        Trial("gpt2-tiny", f"{two}, softening 0.3", 0.0226, 11),
        Trial("gpt2-tiny", "DualMuon, head x 1.5", 0.032, 11),
        *(Trial("gpt2-tiny", NO_WARM_UP, lr, 11) for lr in (0.016, 0.0226)),
        *(Trial("gpt2-tiny", "D-Muon", lr, 11) for lr in (0.0113, 0.016)),
        *(by_role("gpt2-tiny", lr, 11, GPT2_ROLES) for lr in (0.0113, 0.016)),
        by_role("gpt2-tiny", 0.0113, 11, THREE_TIMES),
    )


def head_twice() -> tuple[Trial, ...]:
    """The head at twice the base rate, on the seeds of the tables, at the rates that were taken for the best."""
    two = "DualMuon, head x 2"
    return (
        *(Trial("llama-tiny", two, 0.016, seed) for seed in range(5)),
        Trial("llama-tiny", two, 0.032, 1),
        *(Trial("gpt2-tiny", two, 0.032, seed) for seed in range(5)),
        *(Trial("qwen3-tiny", two, 0.016, seed) for seed in (1, 2)),
        Trial("llama-tiny", two, 0.016, 1, 1000),
        Trial("llama-tiny", "the common part alone, head x 2", 0.016, 1),
        *(Trial("convnet-fashion", two, lr, seed) for lr in FASHION_RATES["DualMuon"] for seed in (0, 1, 2)),
        *(Trial("convnet-digits", two, lr, seed) for lr in (0.004, 0.008, 0.016) for seed in (0, 1, 2)),
    )


def searched() -> tuple[Trial, ...]:
    """Factors of roles on the Llama, one role after the other; and `DualMuon`'s own embedding at other rates."""
    tried = (
        {"embedding": 2.0},
        {"embedding": 4.0},
        {"embedding": 4.0, "head": 2.0},
        {"embedding": 4.0, "head": 4.0},
        {"embedding": 4.0, "head": 4.0, "vector": 2.0},
        {"embedding": 4.0, "head": 4.0, "vector": 4.0},
        {"embedding": 8.0},
        {"embedding": 8.0, "head": 2.0},
        LLAMA_ROLES_SEARCHED,
    )
    return (
        *(by_role("llama-tiny", 0.008, seed, factors) for factors in tried for seed in (0, 1, 2)),
        *(by_role("llama-tiny", 0.008, seed, LLAMA_ROLES_SEARCHED) for seed in (3, 4)),
        by_role("llama-tiny", 0.008, 3, {"embedding": 4.0, "head": 4.0}),
        by_role("llama-tiny", 0.008, 1, {"embedding": 16.0, "head": 4.0}),
        by_role("llama-tiny", 0.0113, 1, LLAMA_ROLES_SEARCHED),
        *(Trial("llama-tiny", NO_WARM_UP, 0.016, seed, roles=(("embedding", 2.0),)) for seed in (0, 1, 2, 11)),
        Trial("llama-tiny", NO_WARM_UP, 0.016, 11, roles=(("embedding", 4.0),)),
    )


def factors() -> tuple[Trial, ...]:
    """The same on the GPT-2 and the Qwen-3, from their factors of 2 and 3 on; the best on the table's other seeds."""
    by_model: dict[str, tuple[float, tuple[dict[str, float], ...]]] = {
        "gpt2-tiny": (
            0.016,
            (
                GPT2_ROLES_SEARCHED,
                {**GPT2_ROLES, "head": 8.0},
                {**GPT2_ROLES, "embedding": 4.0, "head": 4.0},
                {"embedding": 1.0, "head": 4.0, "vector": 1.0},
            ),
        ),
        "qwen3-tiny": (0.008, ({**TIED_ROLES, "head": 6.0}, {**TIED_ROLES, "head": 12.0})),
    }
    return (
        *(by_role(model, lr, 1, tried) for model, (lr, all_tried) in by_model.items() for tried in all_tried),
        by_role("gpt2-tiny", 0.0113, 1, GPT2_ROLES_SEARCHED),
        *(by_role("gpt2-tiny", 0.016, seed, GPT2_ROLES_SEARCHED) for seed in (0, 2, 3, 4)),
    )


def at_rates(model: str, rates: Mapping[str, Iterable[float]], seed: int) -> tuple[Trial, ...]:
    """Every rate of every contender."""
    return tuple(Trial(model, contender, lr, seed) for contender, tried in rates.items() for lr in tried)


#: By model: the base rates of the rivals and controls. Factors of two about the best of earlier trials.
RIVALS: Final[Mapping[str, Mapping[str, tuple[float, ...]]]] = {
    "llama-tiny": {
        NO_WARM_UP: (0.008, 0.016),
        "DualMuon, multipliers frozen by unit": (0.008, 0.016),
        "DualMuon, multipliers frozen by kind": (0.008, 0.016),
        "DualMuon, multipliers permuted": (0.008, 0.016),
        "the common part alone": (0.008, 0.016),
        "UpdateFloor(0.35)": (0.004, 0.008, 0.016),
        "NAMO": (0.008, 0.016, 0.032, 0.064, 0.128),
        "MuonMax-Momo": (0.001, 0.003, 0.01, 0.03),
        "LANTON": (0.004, 0.008, 0.016, 0.032),
        "LANTON's noise on D-Muon": (0.008, 0.016, 0.032),
        "Scion": (2**-13, 2**-12, 2**-11),
        "the step's norm on Scion": (2**-13, 2**-12, 2**-11),
        "torch's Muon": (0.004, 0.008),
        "AdamW": (0.0005, 0.001, 0.002, 0.004),
    },
    "gpt2-tiny": {
        NO_WARM_UP: (0.016, 0.032),
        "DualMuon, multipliers frozen by unit": (0.016, 0.032),
        "DualMuon, multipliers frozen by kind": (0.016, 0.032),
        "DualMuon, multipliers permuted": (0.016, 0.032),
        "the common part alone": (0.016, 0.032),
        "UpdateFloor(0.35)": (0.008, 0.016, 0.032),
        "NAMO": (0.032, 0.064, 0.128),
        "MuonMax-Momo": (0.001, 0.003, 0.01, 0.03),
        "LANTON": (0.016, 0.032, 0.064),
        "LANTON's noise on D-Muon": (0.016, 0.032, 0.064),
        "Scion": (2**-12, 2**-11, 2**-10),
        "the step's norm on Scion": (2**-12, 2**-11, 2**-10),
        "torch's Muon": (0.008, 0.016),
        "AdamW": (0.001, 0.002, 0.004),
    },
}
ADAMW_ROLES: Final[Mapping[str, Mapping[str, float]]] = {"llama-tiny": LLAMA_ROLES, "gpt2-tiny": GPT2_ROLES}


def rivals(model: str, seed: int) -> tuple[Trial, ...]:
    """Every rival and control at its rates, and AdamW with D-Muon's factors of roles."""
    factors = tuple(ADAMW_ROLES[model].items())
    adamw = tuple(Trial(model, "AdamW", lr, seed, roles=factors) for lr in (0.001, 0.002))
    return (*at_rates(model, RIVALS[model], seed), *adamw)


def adamw() -> tuple[Trial, ...]:
    """AdamW with one rate and tuned by role: rates and factors on seed 1, the best on the Llama's seeds 0 and 2 too.

    Among the factors, at 0.002, those that give embedding, head and vectors the rates of D-Muon's at their best.
    """
    factors: dict[str, tuple[tuple[float, Mapping[str, float]], ...]] = {
        "llama-tiny": (
            *((0.001, factors) for factors in (LLAMA_ROLES, LLAMA_ROLES_SEARCHED, {**LLAMA_ROLES_SEARCHED, "vector": 3.0})),
            *((0.002, factors) for factors in (LLAMA_ROLES, LLAMA_ROLES_SEARCHED, {**LLAMA_ROLES_SEARCHED, "vector": 3.0})),
            (0.004, LLAMA_ROLES_SEARCHED),
            *((0.002, {"embedding": by, "head": 8.0}) for by in (8.0, 16.0)),
            *((0.002, {"embedding": by, "head": head}) for by, head in ((16.0, 4.0), (32.0, 16.0))),
            (0.002, {"embedding": 32.0, "head": 16.0, "vector": 4.0}),
        ),
        "gpt2-tiny": (
            *((0.002, {"embedding": 16.0, "head": head, "vector": 16.0}) for head in (32.0, 64.0)),
            (0.004, {"embedding": 8.0, "head": 16.0, "vector": 8.0}),
            (0.002, {"embedding": 8.0, "head": 16.0, "vector": 8.0}),
            (0.002, {"embedding": 4.0, "head": 8.0, "vector": 4.0}),
        ),
        "qwen3-tiny": (
            *((0.002, {"head": by, "vector": by}) for by in (3.0, 6.0, 12.0)),
            (0.002, {"head": 24.0, "vector": 12.0}),
        ),
    }
    first = tuple(
        Trial(model, "AdamW", lr, 1, roles=tuple(roles.items()))
        for model, by_role in factors.items()
        for lr, roles in (*((lr, {}) for lr in (0.001, 0.002, 0.004)), *by_role)
    )
    best = (("embedding", 16.0), ("head", 8.0))
    return (*first, *(Trial("llama-tiny", "AdamW", 0.002, seed, roles=roles) for seed in (0, 2) for roles in (best, ())))


#: By contender: the rates of one for all, those of the matrices where embedding and head have D-Muon's factors.
SHIPPED: Final[Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "NorMuon": ((0.004, 0.008, 0.016), (0.004, 0.008, 0.016)),
    "AdaMuon": ((0.004, 0.008, 0.016, 0.032), (0.004, 0.008, 0.016)),
    "SOAP": ((0.002, 0.004, 0.008, 0.016), (0.002, 0.004, 0.008, 0.016)),
}


def shipped() -> tuple[Trial, ...]:
    """Each with one rate and with the factors of roles that are the best for D-Muon; the closest of them on more seeds."""
    roles = {"llama-tiny": LLAMA_ROLES_SEARCHED, "gpt2-tiny": GPT2_ROLES_SEARCHED}
    closest = tuple(
        Trial(model, "AdaMuon", lr, seed, roles=tuple(roles[model].items()))
        for model, lr in (("llama-tiny", 0.008), ("gpt2-tiny", 0.016))
        for seed in (0, 2)
    )
    return closest + tuple(
        trial
        for model, factors in roles.items()
        for name, (one, by_role) in SHIPPED.items()
        for trial in (
            *(Trial(model, name, lr, 1, roles=tuple(factors.items())) for lr in by_role),
            *(Trial(model, name, lr, 1) for lr in one),
        )
    )


def framed_adamuon() -> tuple[Trial, ...]:
    """Factors of roles as for D-Muon: rates on seed 1, the best on more seeds; and D-Muon with the frame at other rates."""
    roles = {"llama-tiny": LLAMA_ROLES_SEARCHED, "gpt2-tiny": GPT2_ROLES_SEARCHED}
    tried = (
        *((model, lr, 1) for lr in (0.008, 0.016) for model in roles),
        *(("llama-tiny", 0.016, seed) for seed in (0, 2, 3, 4)),
        *(("gpt2-tiny", 0.008, seed) for seed in (0, 2)),
        ("llama-tiny", 0.032, 1),
    )
    d_muon = (
        *(("llama-tiny", 0.0113, seed) for seed in range(5)),
        *(("gpt2-tiny", 0.0113, seed) for seed in range(3)),
        *(("llama-tiny", 0.016, 1), ("gpt2-tiny", 0.008, 1)),
    )
    return tuple(
        Trial(model, name, lr, seed, roles=tuple(roles[model].items()))
        for name, trials in (("frame on AdaMuon", tried), ("frame on D-Muon", d_muon))
        for model, lr, seed in trials
    )


#: By model and contender: the rates of one for all.
CLASSICS: Final[Mapping[str, Mapping[str, tuple[float, ...]]]] = {
    "llama-tiny": {
        "LAMB": (0.008, 0.016, 0.032),
        "Adam-mini": (0.0005, 0.001, 0.002),
        "Prodigy": (1.0, 2.0),
    },
    "gpt2-tiny": {
        "LAMB": (0.016, 0.032),
        "Adam-mini": (0.001, 0.002),
        "Prodigy": (1.0,),
    },
}
#: The factors of roles that are the best for AdamW.
ADAMW_ROLES_SEARCHED: Final[Mapping[str, Mapping[str, float]]] = {
    "llama-tiny": {"embedding": 16.0, "head": 8.0},
    "gpt2-tiny": {"embedding": 16.0, "head": 64.0, "vector": 16.0},
}


def classics() -> tuple[Trial, ...]:
    """One rate for each on both models; Adam-mini with AdamW's factors of roles too."""
    by_role = tuple(
        Trial(model, "Adam-mini", lr, 1, roles=tuple(factors.items()))
        for lr in (0.001,)
        for model, factors in ADAMW_ROLES_SEARCHED.items()
    )
    return tuple(trial for model, rates in CLASSICS.items() for trial in at_rates(model, rates, 1)) + by_role


def three(model: str, roles: Mapping[str, float], rates: Iterable[float], seed: int, steps: int) -> tuple[Trial, ...]:
    """D-Muon, D-Muon tuned by role and DualMuon: the first two at `rates`, the third at twice as much."""
    return tuple(
        trial
        for lr in rates
        for trial in (
            Trial(model, "DualMuon", 2 * lr, seed, steps),
            by_role(model, lr, seed, roles, steps),
            Trial(model, "D-Muon", lr, seed, steps),
        )
    )


STUDIES: Final[Mapping[str, Study]] = {
    "decisive": Study(
        "one rate with the rule against D-Muon with one rate and tuned by role, each at its best, on a Llama and a GPT-2"
        " (on which the rule's constants were chosen) and on a Qwen-3 (on which nothing was)",
        tuple(
            trial
            for seed in (1, 2, 0, 3, 4)
            for model in (llama, gpt2, qwen3)
            for trial in model(seed)
            if model is not qwen3 or seed in (0, 1, 2)
        )
        + tuple(by_role("gpt2-tiny", 0.0113, seed, GPT2_ROLES) for seed in (0, 1, 2)),
    ),
    "llama seeds": Study(
        "the Llama on fourteen more seeds, which decided nothing: whether `DualMuon` is 0.07 below D-Muon tuned by role, and"
        " what is left where that has the frame too",
        llama_seeds((*range(5, 11), *range(13, 21)), 0.016, 0.008, LLAMA_ROLES_SEARCHED, 300),
    ),
    "llama seeds, longer": Study(
        "the same over 1,000 steps on five more seeds: whether anything is left there",
        llama_seeds(range(5, 10), 0.0113, 0.00566, LLAMA_ROLES_LONGER, 1000),
    ),
    "parts": Study("the rule as it is with less of the frame, and the frame with multipliers all at 1 or permuted", parts()),
    "tuning": Study("the constants, base rates and factors of roles, on seeds that no table of losses uses", tuning()),
    "warm-up": Study(
        "the warm-up of momentum taken apart: D-Muon tuned by role with it",
        warm_up_for_all(),
    ),
    "quasi-hyperbolic": Study(
        "the same with all of `DualMuon`'s frame: AdamW's groups are quasi-hyperbolic too",
        (
            *warm_up_for_all("frame on D-Muon"),
            *(Trial("llama-tiny", "frame on D-Muon", 0.00566, s, 1000, tuple(LLAMA_ROLES_LONGER.items())) for s in (3, 4)),
            *(Trial("gpt2-tiny", "frame on D-Muon", 0.00566, s, 1000, tuple(GPT2_ROLES_SEARCHED.items())) for s in (0, 2)),
            *(Trial("qwen3-tiny", "frame on D-Muon", lr, 1, roles=tuple(TIED_ROLES.items())) for lr in (0.0113, 0.016)),
            *(Trial("qwen3-tiny", "frame on D-Muon", 0.008, seed, roles=tuple(TIED_ROLES.items())) for seed in (1, 0, 2)),
        ),
    ),
    "every step": Study("`DualMuon` with a norm at every step, as it was", every_step()),
    "constants": Study("vectors and head at other rates, on seeds that no table of losses uses", constants()),
    "plain AdamW": Study("`DualMuon` with plain AdamW for the rest", plain_adamw()),
    "no warm-up": Study("`DualMuon` as it was before its momentum warmed up", no_warm_up()),
    "head twice": Study("the constants of before: the head at twice the base rate, not three times", head_twice()),
    "searched": Study(
        "D-Muon tuned by role on the Llama, one role after the other: the embedding at 2 to 16 times the matrices' rate",
        searched(),
    ),
    "factors": Study(
        "the same on the GPT-2 and the Qwen-3, both with an embedding tied to the head: the head at up to 12 times",
        factors(),
    ),
    "rates": Study(
        "other base rates (seed 1): the best rates, and how wrong one may be",
        (
            *(Trial("llama-tiny", "DualMuon", lr, 1) for lr in (0.004, 0.008, 0.064)),
            *(Trial("gpt2-tiny", "DualMuon", lr, 1) for lr in (0.004, 0.008, 0.032, 0.064)),
            *(Trial("qwen3-tiny", "DualMuon", lr, 1) for lr in (0.008, 0.032)),
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
                *at_rates("convnet-fashion", FASHION_RATES, seed),
                *(by_role("convnet-fashion", lr, seed, TIED_ROLES) for lr in (0.004, 0.008, 0.016)),
            )
        ),
    ),
    "digits": Study(
        "the same on scikit-learn's digits, 359 images held out",
        tuple(
            trial
            for seed in (0, 1, 2)
            for trial in (
                *at_rates("convnet-digits", DIGITS_RATES, seed),
                *(by_role("convnet-digits", lr, seed, TIED_ROLES) for lr in (0.0005, 0.001, 0.002, 0.004)),
            )
        ),
    ),
    "controls": Study(
        "the Llama (seed 1) with the groups' fixed rates and no rule, D-Muon with 1.3 times the tokens,"
        " and rivals at one rate each",
        (
            Trial("llama-tiny", "the common part alone", 0.016, 1),
            Trial("llama-tiny", "D-Muon", 0.008, 1, 390),
            Trial("llama-tiny", "DualMuon, multipliers permuted", 0.016, 1),
            Trial("llama-tiny", "UpdateFloor(0.35)", 0.008, 1),
            Trial("llama-tiny", "MuonMax-Momo", 0.03, 1),
            Trial("llama-tiny", "NAMO", 0.016, 1),
        ),
    ),
    "longer": Study(
        "the Llama at 1,000 steps: whether the gain shrinks; rates and factors of roles on seed 1,"
        " the best on up to five seeds",
        (
            *(Trial("llama-tiny", "DualMuon", 0.0113, seed, 1000) for seed in (0, 2, 3, 4)),
            *(Trial("llama-tiny", "DualMuon", 0.008, seed, 1000) for seed in (1, 0)),
            *(Trial("llama-tiny", "DualMuon, head x 2", 0.016, seed, 1000) for seed in (0, 2)),
            *(by_role("llama-tiny", 0.00566, seed, LLAMA_ROLES, 1000) for seed in (0, 2)),
            *(by_role("llama-tiny", 0.00566, seed, LLAMA_ROLES_LONGER, 1000) for seed in range(5)),
            *(Trial("llama-tiny", "DualMuon", lr, 1, 1000) for lr in (0.016, 0.0113)),
            *(Trial("llama-tiny", "D-Muon", lr, 1, 1000) for lr in (0.008, 0.00566)),
            by_role("llama-tiny", 0.00566, 1, LLAMA_ROLES_HEAD_6, 1000),
            by_role("llama-tiny", 0.00566, 1, LLAMA_ROLES_SEARCHED, 1000),
            by_role("llama-tiny", 0.008, 1, LLAMA_ROLES, 1000),
            by_role("llama-tiny", 0.00566, 1, LLAMA_ROLES, 1000),
            by_role("llama-tiny", 0.004, 1, LLAMA_ROLES, 1000),
        ),
    ),
    "longer-gpt2": Study(
        "the GPT-2 at 1,000 steps: rates on seed 1, the best on up to three seeds",
        (
            *(Trial("gpt2-tiny", "DualMuon", 0.0113, seed, 1000) for seed in (0, 2)),
            *(by_role("gpt2-tiny", 0.00566, seed, GPT2_ROLES_SEARCHED, 1000) for seed in (0, 2)),
            *(Trial("gpt2-tiny", "DualMuon", lr, 1, 1000) for lr in (0.0113, 0.008, 0.016)),
            *(by_role("gpt2-tiny", lr, 1, GPT2_ROLES_SEARCHED, 1000) for lr in (0.0113, 0.008, 0.016, 0.00566)),
        ),
    ),
    "frame": Study(
        "what the rule stands on (seed 1): a shorter momentum, no decay, another second average",
        (
            Trial("llama-tiny", "DualMuon, momentum 0.9", 0.016, 1),
            Trial("llama-tiny", "DualMuon, momentum 0.9", 0.0226, 1),
            Trial("llama-tiny", "DualMuon, momentum 0.8", 0.016, 1),
            Trial("llama-tiny", "momentum 0.9 on D-Muon", 0.008, 1, roles=tuple(LLAMA_ROLES_SEARCHED.items())),
            Trial("llama-tiny", "DualMuon, no decay", 0.016, 1),
            Trial("llama-tiny", "DualMuon, AdamW's beta 0.99", 0.016, 1),
            Trial("gpt2-tiny", "DualMuon, momentum 0.9", 0.016, 1),
            Trial("llama-tiny", "DualMuon, momentum 0.9", 0.0113, 1, 1000),
        ),
    ),
    "rivals": Study(
        "what others reach, and what of the rule is worth something (seed 1): other optimizers and rules, and the rule with"
        " its multipliers frozen, permuted among the matrices, or all at 1; NAMO on more seeds",
        (
            *(Trial("llama-tiny", "NAMO", 0.064, seed) for seed in (0, 2, 3, 4)),  # the closest of them
            *(Trial("gpt2-tiny", "NAMO", 0.064, seed) for seed in (0, 2)),
            *rivals("llama-tiny", 1),
            *rivals("gpt2-tiny", 1),
        ),
    ),
    "shipped": Study(
        "NorMuon, AdaMuon and SOAP as pytorch-optimizer ships them, at one rate and with D-Muon's factors of roles",
        shipped(),
    ),
    "frame on AdaMuon": Study(
        "AdaMuon of pytorch-optimizer with `DualMuon`'s frame and rates by role, and D-Muon with it at other rates: whether"
        " the rule is worth more than that",
        framed_adamuon(),
    ),
    "classics": Study(
        "LAMB (a trust ratio for each layer), Adam-mini (a rate for each block) and Prodigy (finds its own rate) as"
        " pytorch-optimizer ships them",
        classics(),
    ),
    "AdamW": Study("AdamW with one rate and tuned by role, on the three language models", adamw()),
    "small": Study(
        "a Llama of 5.5 M parameters at 1,000 steps: whether the gain lasts with size; rates and factors of roles on seed 1,"
        " the best on up to three seeds",
        (
            *(Trial("llama-small", "DualMuon", 0.008, seed, 1000) for seed in (0, 2)),
            Trial("llama-small", "DualMuon", 0.00566, 1, 1000),
            *(by_role("llama-small", 0.00283, seed, LLAMA_ROLES_LONGER, 1000) for seed in (0, 2)),
            Trial("llama-small", "frame on D-Muon", 0.00283, 1, 1000, tuple(LLAMA_ROLES_LONGER.items())),
            Trial("llama-small", "DualMuon", 0.0113, 1, 1000),
            by_role("llama-small", 0.00566, 1, LLAMA_ROLES, 1000),
            *(by_role("llama-small", lr, 1, LLAMA_ROLES_LONGER, 1000) for lr in (0.00566, 0.004, 0.00283)),
            *(Trial("llama-small", "D-Muon", lr, 1, 1000) for lr in (0.00566, 0.004, 0.008)),
            *three("llama-small", LLAMA_ROLES, (0.008, 0.004), 1, 1000),
        ),
    ),
    "batches": Study(
        "batches of 8 sequences, and of 64 (seed 1), 200 steps of the second",
        (
            *three("llama-tiny, batch 8", LLAMA_ROLES, (0.004, 0.008), 1, 300),
            *three("llama-tiny, batch 64", LLAMA_ROLES, (0.008, 0.016), 1, 200),
            by_role("llama-tiny, batch 8", 0.008, 1, LLAMA_ROLES_SEARCHED),
            by_role("llama-tiny, batch 64", 0.016, 1, LLAMA_ROLES_SEARCHED, 200),
        ),
    ),
    "lora": Study(
        "adapters of rank 8 on a small GPT-2; D-Muon tuned by role has B at 2 or 4 times A's rate, or half of it",
        tuple(
            trial
            for seed in (0, 1, 2)
            for lr in (0.004, 0.008, 0.016, 0.032)
            for trial in (
                Trial("gpt2-lora", "DualMuon", 2 * lr, seed),
                Trial("gpt2-lora", "D-Muon", lr, seed),
                *(by_role("gpt2-lora", lr, seed, {"lora_B": factor}) for factor in (0.5, 2.0, 4.0)),
                Trial("gpt2-lora", "AdamW", lr, seed),
            )
        )
        + tuple(Trial("gpt2-lora", "DualMuon", 0.128, seed) for seed in (0, 1, 2)),
    ),
    "lora seeds": Study(
        "each at the rate that is best there, on seeds that decided neither rates nor factors; another start, trained anew",
        tuple(
            trial
            for seed in range(3, 11)
            for trial in (
                Trial("gpt2-lora", "DualMuon", 0.064, seed),
                Trial("gpt2-lora", "D-Muon", 0.016, seed),
                by_role("gpt2-lora", 0.016, seed, {"lora_B": 2.0}),
                Trial("gpt2-lora", "AdamW", 0.016, seed),
            )
        ),
    ),
}
