"""Modules that are found by being there."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def import_files(package: ModuleType) -> None:
    """Import every module of a package, so that what is registered there has its name."""
    for found in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(found.name)
