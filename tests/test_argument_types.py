"""Every keyword of every public function and class refuses a value of another type, and names it."""

from __future__ import annotations

import inspect
import pickle
import re
from abc import ABC
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.common.parameter_names import first_few
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.watching.output_change import OutputChange
from layerwise.integrations.transformers import FunctionSpaceCallback, LayerRatesCallback, WatchCallback, trainer_optimizer

#: Made by us and read by users, abstract, or without arguments.
NOT_CALLED = {
    "BaseRates", "ColNorm", "Frobenius", "Geometry", "LayerRate", "LayerwiseError", "LocalWork", "NonFiniteError",
    "Layout", "RateRule", "Rates", "RowNorm", "SizeCheck", "Update", "VectorRMS", "WatchRecord", "__version__", "optimizers",
    "rate_rules",
}  # fmt: skip
CALLED: dict[str, Callable[..., Any]] = {
    **{name: getattr(lw, name) for name in lw.__all__ if name not in NOT_CALLED},
    **{f"registered {name}": known.build for name, known in lw.optimizers().items()},
    **{f"rule {name}": rule for name, rule in lw.rate_rules().items()},
    **{kind.__name__: kind for kind in (Measurement, OutputChange, LayerRatesCallback, WatchCallback)},
    "FunctionSpaceCallback": FunctionSpaceCallback,
}


class Odd:
    """What no parameter takes."""

    def __repr__(self) -> str:
        return "an odd thing"


#: Checked by the function itself, whose words say more: tests/optim/test_optim_errors.py, tests/geometry/test_groups.py.
SAYS_NOTHING = {"Any", "Iterable[Any]", "Iterable[Tensor] | Iterable[tuple[str, Tensor]]"}

#: What does not fit where a signature says this and nothing beside it: written down here, not read from the checks.
WRONG = {
    "bool": ["off", "no", 1, 0, None, [True]],
    "int": ["3", 3.5, True, None, [3]],
    "int | None": ["3", 3.5, True, [3]],
    "PositiveInt": ["3", 3.5, True, None, [3], 0, -1],
    "PositiveInt | None": ["3", 3.5, True, [3], 0, -1],
    "NonNegativeInt": ["3", 3.5, True, None, [3], -1],
    "NonNegativeInt | None": ["3", 3.5, True, [3], -1],
    "Factor | None": ["abc", True, [0.1], {}, 0.5, -2],
    "Slices": ["all", 3.5, True, None, [3], 0, -1],
    "float": ["abc", "1e-3", True, None, [0.1], {}],
    "Fraction": ["abc", True, None, [0.1], 1, -0.1, float("nan")],
    "NonNegative": ["abc", True, None, [0.1], -1, float("inf")],
    "Alpha": ["abc", True, None, -1, 1e15],
    "Floor": ["abc", True, None, 0, 1],
    "GroupAlpha": ["abc", True, None, -1, 1000],
    "Softening": ["abc", True, None, 0, 1e6],
    "ReferenceName": [3, None, "prev"],
    "float | None": ["abc", True, [0.1], {}],
    "float | Tensor": ["abc", True, None, [0.1]],
    "str": [3, True, None, ["a"], 0.5],
    "str | None": [3, True, ["a"], 0.5],
    "tuple[float, float]": ["abc", 0.9, None, {}, ("a", "b"), (True, 0.9)],
    "Sequence[float]": ["64,128", 64, None, ["a"], {1: 2}],
    "Sequence[int]": ["64,128", 64, None, ["a"], [1.5], {1: 2}],
    "Sequence[str]": ["a", 64, None, [3]],
    "Iterable[int]": [3, None],
    "Mapping[str, float]": ["abc", 3, None, [1.0], {3: 1.0}],
    "Mapping[str, Tensor]": ["abc", 3, None, {3: torch.ones(1)}],
    "nn.Module": ["abc", 3, None, torch.nn.Linear],
    "RateRule | None": ["noise", True, 3, lw.NoiseAdaptive],
    "UnusualRule | None": ["rule", True, 3, lw.UnusualRule],
    "Split | None": ["q k v", True, 3],
    "Tensor | None": ["abc", True, 3],
    "Tensor": ["abc", True, 3, None],
    "Forward | str | None": [3, True, ["a"]],
    "Forward | None": [3, True, "log_softmax"],
    "Literal['groups', 'base']": ["group", 3, None, True],
    "Literal['max', 'mean']": ["most", 3, None],
    "Decay": ["scale", 3, None],
}


def arguments() -> list[Any]:
    found = []
    for called, function in CALLED.items():
        for parameter in inspect.signature(function).parameters.values():
            variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variable and parameter.annotation not in SAYS_NOTHING and not parameter.name.startswith("_"):
                found.append(pytest.param(function, parameter, id=f"{called}-{parameter.name}"))
    return found


def refuses(function: Callable[..., Any], name: str, value: Any) -> None:
    stacks = {"g": torch.eye(2)} if function in (lw.polar, lw.nuclear_norm) else {}
    with pytest.raises(lw.LayerwiseError) as said:
        function(**{**stacks, name: value})
    assert re.search(rf"\b{name}\b", str(said.value))
    assert " ".join(repr(value).split())[:60] in str(said.value)


@pytest.mark.parametrize(("function", "parameter"), arguments())
def test_a_value_of_another_type_is_refused_and_named(function: Callable[..., Any], parameter: inspect.Parameter) -> None:
    plain = re.sub(r"^Annotated\[(.*), \".*\"\]$", r"\1", parameter.annotation)
    for value in (Odd(), *WRONG.get(plain, [])):
        refuses(function, parameter.name, value)


def test_most_annotations_have_wrong_values_of_their_own() -> None:
    """So that a change of words in the signatures does not leave the test above with one odd thing alone."""
    found = [argument.values[1].annotation for argument in arguments()]
    assert sum(annotation in WRONG for annotation in found) > 0.8 * len(found)


@pytest.mark.parametrize("name", sorted(set(CALLED) - {"polar", "nuclear_norm"}))
def test_a_name_that_is_no_argument_is_refused_with_what_was_meant(name: str) -> None:
    parameters = inspect.signature(CALLED[name]).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        pytest.skip("takes further options, which what they go to refuses")
    with pytest.raises(lw.LayerwiseError, match=r"amsgrad='off'.*(did you mean|it takes)"):
        CALLED[name](amsgrad="off")


MODEL = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda options: lw.function_space_rates(MODEL, {"weight": torch.ones(2, 2)}, torch.ones(1, 2), **options),
        lambda options: lw.FunctionSpaceRecorder(MODEL, torch.optim.SGD(MODEL.parameters(), lr=0.1), **options),
        lambda options: lw.FLeRM(MODEL, torch.optim.SGD(MODEL.parameters(), lr=0.1), **options),
        lambda options: lw.watch(MODEL, torch.optim.SGD(MODEL.parameters(), lr=0.1), **options),
        lambda options: lw.LayerwiseOptimizer(lw.param_groups(MODEL), **options),
        lambda options: lw.check(
            lambda n: nn.Linear(2, n), (2, 4), lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
            (torch.ones(1, 2), torch.ones(1, 4)), **options
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{"memory": "lots"}, {"probes": 1.5}, {"seeed": 3}, {"amsgrad": "off"}])
def test_options_that_are_passed_on_are_refused_too(call: Callable[..., Any], options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(lw.LayerwiseError) as said:
        call(options)
    assert name in str(said.value)
    assert repr(value) in str(said.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda o: lw.watch(MODEL, o, function_space=2),
            r"watch\(function_space=2\).*did you mean 'function_space_every'\?",
        ),
        (lambda o: lw.watch(MODEL, o, porbes=2), r"watch\(porbes=2\).*did you mean 'probes'\?"),
        (lambda o: lw.FLeRM(MODEL, o, xyz=2), r"FLeRM\(xyz=2\).*it takes model, optimizer, base, .*probes"),
        (lambda o: lw.FunctionSpaceRecorder(MODEL, o, evry=2), r"FunctionSpaceRecorder\(evry=2\).*did you mean 'every'\?"),
        (
            lambda o: trainer_optimizer(lw.DualMuon, overides={})[0]()(MODEL, overides={}),
            r"trainer_optimizer\(overides={}\).*did you mean 'overrides'\?",
        ),
    ],
)
def test_a_name_that_nobody_takes_is_told_by_what_was_called_with_all_that_it_takes(call: Any, said: str) -> None:
    with pytest.raises(lw.LayerwiseError, match=said):
        call(torch.optim.SGD(MODEL.parameters(), lr=0.1))


def test_numbers_of_numpy_and_of_torch_are_numbers() -> None:
    groups = lw.param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    optimizer = lw.DMuon(groups, lr=torch.tensor(0.1), momentum=np.float32(0.5), nesterov=True)
    assert next(g for g in optimizer.param_groups if g["role"] == "hidden")["momentum"] == 0.5
    assert lw.ConvLayout(groups=2) == lw.ConvLayout(None, 2)


def test_what_a_user_registers_is_checked_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.optim.rules.rule._RULES", {})

    @lw.register_rule("checked_rule")
    class CheckedRule(lw.RateRule):
        def __init__(self, power: float = 0.5) -> None:
            self.power = power

    with pytest.raises(lw.LayerwiseError, match=r"CheckedRule\(power='half'\): give a number"):
        CheckedRule(power="half")
    assert CheckedRule(power=1).power == 1


class Base(ABC):
    """A base of a user's own, which no class of the package is derived from."""


def test_a_users_own_base_is_named_without_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.optim.rules.rule._RULES", {})

    @lw.register_rule("with_base")
    class WithBase(lw.RateRule):
        def __init__(self, base: Base | None = None) -> None:
            self.base = base

    with pytest.raises(lw.LayerwiseError, match=r"WithBase\(base='mine'\): give a Base"):
        WithBase(base="mine")  # type: ignore[arg-type]


def test_a_message_names_the_first_few_and_counts_the_others() -> None:
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert first_few(["a", "b"], most=1) == "a and 1 more"


def test_an_unknown_argument_is_told_to_another_process_too() -> None:
    """What cannot be unpickled would stop a pool of processes in place of the trial that it ends."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(lw.LayerwiseError, match="there is no 'probs'; did you mean 'probes'") as raised:
        lw.FunctionSpaceRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), probs=2)
    sent = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(sent, lw.LayerwiseError)
    assert str(sent) == str(raised.value)
