"""Runs in a folder, found again by their config alone, whatever the command that made them."""

from __future__ import annotations

from pathlib import Path

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import hashed, identity
from layerwise.lab.config.schema import Config
from layerwise.lab.runs.directory import find_runs, read_info
from layerwise.lab.training.run import complete


class RunStore:
    """The runs in a folder: one that has ended is never repeated, one that was interrupted goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        for path in find_runs(folder) if folder.is_dir() else ():
            try:
                self._paths[hashed(identity(read_info(path).config))] = path
            except LayerwiseError:
                continue  # not a run we could use; its folder's name stays taken

    def place(self, config: Config, stem: str) -> Config:
        """The config with the directory of its run: the one it has already, or a free one named after `stem`."""
        key = hashed(identity(complete(config).model_dump()))
        if key not in self._paths:
            self._paths[key] = self._free_path(stem)
        path = self._paths[key]
        return config.replace({"run.dir": str(path.parent), "run.name": path.name})

    def _free_path(self, stem: str) -> Path:
        number = 1
        while (path := self.folder / f"{stem}-{number}").exists() or path in self._paths.values():
            number += 1
        return path
