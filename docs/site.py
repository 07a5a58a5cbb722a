"""What of the site lies outside docs/: README, results and examples, under links that work in both places."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: At the root of the repository, linking into docs/ as `docs/...`.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
#: Folders beside docs/, which its pages link to as `../...`.
FOLDERS = ("benchmarks", "examples", "configs", "tests/geometry")
#: The pages of the API reference: their headings, by the room that a public name comes from.
ROOMS = {
    "optim": "Optimizers and rate rules",
    "geometry": "Geometry and roles",
    "function_space": "Function space",
    "errors": "Errors",
}
SUFFIXES = {".md", ".json", ".png", ".svg", ".py", ".yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add them to the files of the site."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = (
            text.replace("](docs/", "](")
            .replace("](README.md", "](index.md")
            .replace("](examples)", "](examples/README.md)")
        )
        files.append(File.generated(config, target, content=text))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for room in ROOMS:
        files.append(File.generated(config, f"api/{room}.md", content=reference(room)))
    return files


def reference(room: str) -> str:
    """The page of one room: every name that it makes public, functions before classes."""
    names = sorted(import_module(f"layerwise.{room}").__all__, key=lambda name: (name[0].isupper(), name))
    return "\n\n".join([f"# {ROOMS[room]}", *(f"::: layerwise.{name}" for name in names)]) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/ to its neighbours, whose place in the site is beside them."""
    if "/" in page.file.src_uri:
        return markdown.replace("](../../docs/", "](../../").replace("](../docs/", "](../")
    for name in (*(f"{folder}/" for folder in FOLDERS), *PAGES):
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown
