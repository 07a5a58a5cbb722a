"""What presets share: matrices inside the network take unit steps, the rest AdamW's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from layerwise.optim.groups.complete import Recipe
from layerwise.optim.groups.options import check_option

MATRIX_ROLES: Final = ("hidden", "conv", "experts", "lora_A", "lora_B")


def matrices_and_the_rest(matrices: Mapping[str, Any], rest: Mapping[str, Any]) -> Recipe:
    """Unit steps with the options ``matrices`` for :data:`MATRIX_ROLES`, AdamW with ``rest`` for all other roles."""
    for key, value in rest.items():
        check_option(key, value, called=f"adamw_{key}")
    return dict.fromkeys(MATRIX_ROLES, matrices) | {"default": {"update": "adamw", **rest}}
