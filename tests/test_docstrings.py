"""The docstrings of what is public: each has an example, and the example runs and prints what it says."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.optim import named_optimizers
from layerwise.optim.rules import rule

PUBLIC = [name for name in lw.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_public_name_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, table in ((named_optimizers, "_OPTIMIZERS"), (rule, "_RULES")):  # examples add to them
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    found = doctest.DocTestFinder(recurse=False).find(getattr(lw, name), name, globs={"lw": lw, "torch": torch, "nn": nn})
    examples = [test for test in found if test.examples]
    assert examples, f"the docstring of layerwise.{name} has no example"
    torch.manual_seed(0)
    for test in examples:
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
        assert not failed, f"the example of layerwise.{name} does not print what it says"
