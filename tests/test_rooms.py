"""The rooms: each imports only those before it, and `import layerwise` needs torch and numpy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import layerwise

ROOT = Path(layerwise.__file__).parent
FLOOR = {"common", "errors"}
ALLOWED = {
    "common": FLOOR,
    "geometry": {"geometry", *FLOOR},
    "optim": {"geometry", "optim", *FLOOR},
    "function_space": {"function_space", *FLOOR},
    "integrations": {"geometry", "optim", "function_space", "integrations", *FLOOR},
}
LIBRARIES = {
    "common": {"torch", "numpy"},
    "geometry": {"torch", "numpy"},
    "optim": {"torch", "numpy"},
    "function_space": {"torch", "numpy"},
}
#: What lies in each of these rooms, and which of the other things there each of them imports.
INSIDE = {
    "function_space": {
        "rates": set(),
        "measuring": {"rates"},
        "steps": {"measuring", "rates"},
        "matching": {"measuring", "steps", "rates"},
        "checking": {"matching", "measuring", "rates", "steps"},
        "watching": {"measuring", "rates", "steps"},
    },
    "optim": {
        "guard": set(),
        "scaling": set(),
        "work": set(),
        "rounding": {"guard", "work"},
        "rules": {"work"},
        "updates": {"rounding", "rules", "scaling", "work"},
        "groups": {"rounding", "rules", "scaling", "updates", "work"},
        "state": {"groups", "work"},
        "optimizer": {"groups", "guard", "rounding", "rules", "state", "updates", "work"},
        "named_optimizers": {"optimizer", "rules"},
        "presets": {"groups", "named_optimizers", "optimizer", "rules"},
    },
    "lab": {
        "runs": set(),
        "config": {"runs"},
        "data": {"config"},
        "models": {"config", "runs"},
        "optimizers": {"config", "models", "runs"},
        "training": {"config", "data", "models", "optimizers", "runs"},
        "report": {"config", "optimizers", "runs"},
        "experiments": {"config", "data", "models", "optimizers", "report", "runs", "training"},
        "cli": {"config", "experiments", "models", "optimizers", "report", "runs", "training"},
    },
}
#: The one file that needs more; nothing imports it before a path of its own is asked for.
TRITON = "layerwise.geometry.spectral.triton_kernels"


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether imported when the file is) of every import statement."""
    tree = ast.parse(path.read_text())
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _for_types_only(node)]
    lazy = {n for node in later for n in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", node not in lazy))
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_before_it(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for module, _ in imports(path):
            if module.startswith("layerwise."):
                assert module.split(".")[1] in ALLOWED[room], f"{path} imports {module}"


@pytest.mark.parametrize("room", LIBRARIES)
def test_the_library_rooms_import_torch_and_numpy_alone(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        if path.stem == TRITON.rpartition(".")[2]:
            continue
        for module, eager in imports(path):
            assert module != TRITON or not eager, f"{path} imports {TRITON} at once"
            top = module.split(".")[0]
            if eager and top not in sys.stdlib_module_names and top != "layerwise":
                assert top in LIBRARIES[room], f"{path} imports {module}"


def test_import_layerwise_loads_no_library_of_the_lab() -> None:
    heavy = "transformers accelerate datasets peft matplotlib typer rich pydantic sklearn tokenizers lightning yaml"
    code = f"import sys, layerwise; print([m for m in {heavy.split()!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_has_a_docstring() -> None:
    for name in layerwise.__all__:
        if name != "__version__":
            assert getattr(layerwise, name).__doc__, f"layerwise.{name} has no docstring"


def test_what_a_room_imports_for_type_checkers_alone_is_named_beside_its_star() -> None:
    """A star does not hand it on to those who read without running, such as the API reference."""
    named = {name for _, name in type_checking_imports(ROOT / "__init__.py")}
    for room in (module.rpartition(".")[2] for module, name in type_checking_imports(ROOT / "__init__.py") if name == "*"):
        path = ROOT / room / "__init__.py"
        if path.exists():
            assert {name for _, name in type_checking_imports(path)} <= named


def type_checking_imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of what a file imports under `if TYPE_CHECKING`."""
    guarded = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    found = [inner for node in guarded for inner in node.body if isinstance(inner, ast.ImportFrom)]
    return [(node.module or "", alias.name) for node in found for alias in node.names]


def inside(room: str) -> dict[str, set[str]]:
    """The files and folders of a room, each with those of the others that it imports, at once or later."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / room).rglob("*.py"):
        name = path.relative_to(ROOT / room).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        found.setdefault(name, set())
        for module, _ in imports(path):
            if module.startswith(f"layerwise.{room}."):
                found[name].add(module.split(".")[2])
    return {name: others - {name} for name, others in found.items()}


@pytest.mark.parametrize("room", INSIDE)
def test_inside_a_room_each_thing_imports_what_its_plan_allows(room: str) -> None:
    found = inside(room)
    assert found.keys() == INSIDE[room].keys(), "what lies in the room and what its plan names differ"
    for name, others in found.items():
        assert others <= INSIDE[room][name], f"{room}/{name} imports {sorted(others - INSIDE[room][name])}"
    list(TopologicalSorter(INSIDE[room]).static_order())  # raises CycleError for a plan with a circle


@pytest.mark.parametrize("room", [*ALLOWED, "lab"])
def test_no_file_of_a_room_imports_itself_over_others(room: str) -> None:
    files = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in (ROOT / room).rglob("*.py")}
    graph = {module: {m for m, eager in imports(path) if eager and m in files} for module, path in files.items()}
    list(TopologicalSorter(graph).static_order())


def test_no_file_name_stands_twice() -> None:
    names = Counter(path.name for path in ROOT.rglob("*.py") if not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []
