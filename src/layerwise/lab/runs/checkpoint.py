"""Checkpoints: a folder per step, complete or absent, checked against its own hashes when it is read.

    checkpoints/step-00000100/
      state.pt        what `Trainer._save` gives: model, optimizer, schedule, random states, observers, step, losses so far,
                      lengths of the run's records
      manifest.json   step, size and sha256 of state.pt, and what the state belongs to

A checkpoint is written into a folder of another name, flushed to the disk, and moved into place; only then is an
older one removed. So the last good one always stands, whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.errors import LayerwiseError
from layerwise.lab.runs.directory import write_json

_STATE, _MANIFEST, _UNFINISHED = "state.pt", "manifest.json", ".tmp"
_FORMAT = 1


class DamagedCheckpointError(LayerwiseError):
    """A checkpoint that is not what was written: truncated, changed, or unreadable."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], identity: dict[str, Any], keep: int) -> Path:
    """Writes `state` as the checkpoint of `step` and removes all but the newest `keep`."""
    final = folder / f"step-{step:08d}"
    work = folder / (final.name + _UNFINISHED)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with open(work / _STATE, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's own, where it could not write to the end
        shutil.rmtree(work, ignore_errors=True)
        free = shutil.disk_usage(folder).free // 1024
        raise LayerwiseError(
            f"checkpoint {final} cannot be written ({error!s:.200}; {free:,} KiB are free there); those before it stand, and"
            " --resume goes on from them"
        ) from None
    manifest = {"format": _FORMAT, "step": step, "identity": identity, **_fingerprint(work / _STATE)}
    write_json(work / _MANIFEST, manifest)
    _remove(final)
    work.rename(final)
    _sync_folder(folder)
    for old in list_checkpoints(folder)[keep:]:
        _remove(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted((path for path in found if (path / _MANIFEST).exists()), reverse=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises DamagedCheckpointError."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint {path / _MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DamagedCheckpointError(f"checkpoint {path / _MANIFEST} is not of format {_FORMAT}, which this version reads")
    return manifest


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, tensors on the CPU. Raises DamagedCheckpointError.

    Only tensors and plain values are unpickled (`weights_only`), so that a checkpoint from elsewhere runs no code.
    """
    check_hash(path)
    return read_state(path)


def check_hash(path: Path) -> None:
    """Raises DamagedCheckpointError where a checkpoint is not byte for byte what was written."""
    manifest, file = read_manifest(path), path / _STATE
    try:
        found = _fingerprint(file)
    except OSError as error:
        raise _unreadable(file, error) from None
    if found != {key: manifest.get(key) for key in found}:
        size = f"{found['bytes']} bytes of {manifest.get('bytes')}"
        raise DamagedCheckpointError(f"checkpoint {file} is damaged: it has {size}, or another hash; delete its folder")


def read_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint folder whose hash was checked."""
    file = path / _STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that was made up, torch raises many kinds
        raise _unreadable(file, error) from None
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"checkpoint {file} holds {type(state).__name__}, no state of a run")
    return state


def _unreadable(file: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {file} cannot be read: {error!s:.200}")


def _fingerprint(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _remove(path: Path) -> None:
    """The manifest goes first: a removal that is cut short leaves nothing that looks complete."""
    (path / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_state() -> dict[str, Any]:
    """The state of this process's global generators, in tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's device
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` took."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
