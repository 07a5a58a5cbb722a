"""Roles by the forward pass against roles by the modules, for a model of transformers.

`python tests/geometry/role_audit.py TYPE ...` prints the differences of these types as JSON, of all types without
arguments; `role_differences.json` is made of it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

from tiny_transformers import model_types, tiny_model
from torch import nn

from layerwise.geometry.forward import look
from layerwise.geometry.modules.roles import find_roles

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class NotRunError(Exception):
    """The tiny model cannot be made, or does not run on the batch that is made for it."""


def compared(model_type: str) -> tuple[nn.Module, Any, Any]:
    """A tiny model, its roles by the forward pass, and its roles by the modules."""
    try:
        model = tiny_model(model_type)
    except Exception as error:  # sizes that a config refuses, libraries that are not there
        raise NotRunError(str(error)) from error
    evidence, _ = look(model)
    if evidence is None:
        raise NotRunError("it does not run on the batch that is made for it")
    return model, find_roles(model, evidence), find_roles(model)


def differences(by_forward: Any, by_modules: Any) -> dict[str, list[str]]:
    """name, with # for numbers -> [by the forward pass, by the modules], where the two differ."""
    found = {}
    for seen, known in zip(by_forward, by_modules, strict=True):
        pair = [f"{each.role}: {each.layout}" for each in (seen, known)]
        if pair[0] != pair[1]:
            found[NUMBER.sub("#", seen.name)] = [NUMBER.sub("#", text) for text in pair]
    return found


def main() -> None:
    logging.disable(logging.ERROR)
    table = {}
    for model_type in sys.argv[1:] or model_types():
        try:
            _, by_forward, by_modules = compared(model_type)
        except NotRunError:
            continue
        table[model_type] = differences(by_forward, by_modules)
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
