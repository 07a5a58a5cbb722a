"""A new optimizer is one class under one decorator: its name, title, keys, rate rule and page follow."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import tiny_config

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.lab.config.load import load_config
from layerwise.lab.optimizers.registry import optimizers
from layerwise.lab.report.grouping import looks, optimizer_title
from layerwise.lab.training.run import complete, train
from layerwise.optim import named_optimizers

PAGE = Path(__file__).parents[2] / "docs" / "make_configuration.py"


@pytest.fixture
def registered() -> Iterator[str]:
    @lw.register_optimizer("sign-descent", title="Sign descent")
    class SignDescent(lw.LayerwiseOptimizer):
        def __init__(self, params, lr=1e-3, *, weight_decay=0.01, patience: int = 3):  # type: ignore[no-untyped-def]
            super().__init__(
                params,
                {"default": {"geometry": lw.Sign(), "momentum": 0.0}},
                lr=lr,
                weight_decay=weight_decay,
            )

    yield "sign-descent"
    named_optimizers._OPTIMIZERS.pop("sign-descent")


def test_a_registered_optimizer_is_known_everywhere(registered: str, tmp_path: Path) -> None:
    config = complete(load_config(None, [f"optimizer={registered}"]))
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-3, 0.01)
    with pytest.raises(LayerwiseError, match="did you mean `patience`"):
        complete(load_config(None, [f"optimizer={registered}", "optimizer.patiense=3"]))
    with pytest.raises(LayerwiseError, match=r"optimizer\.patience='no'"):
        complete(load_config(None, [f"optimizer={registered}", "optimizer.patience=no"]))
    assert optimizer_title(registered) == "Sign descent"
    assert len({look.color for look in looks([*[*optimizers()][:6], registered])}) == 7
    assert "| `sign-descent` |" in runpy.run_path(str(PAGE))["page"]()
    assert train(tiny_config(tmp_path, optimizer__name=registered)).status == "finished"
    assert registered in optimizers()


@pytest.mark.parametrize("names", [["adamw"] * 40, ["adamw", "lanton", "d-muon", "scion"] * 10])
def test_forty_contenders_have_forty_looks(names: list[str]) -> None:
    """There are eight colours: where one comes again, it comes with another marker."""
    chosen = looks(names)
    assert len(set(chosen)) == len(names)
    assert len({look.color for look in chosen[:8]}) == 8
