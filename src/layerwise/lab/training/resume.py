"""Going on with an interrupted run: which checkpoint, and whether it belongs to this run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.lab.config.identity import differences, identity
from layerwise.lab.runs.checkpoint import DamagedCheckpointError, check_hash, list_checkpoints, read_manifest
from layerwise.lab.runs.directory import cleared_away, read_lines


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any], what: str) -> None:
    """Raises LayerwiseError naming the keys in which the config differs from that of `what`. The text is not compared."""
    differing = differences(identity(saved, ""), identity(config, ""))
    if differing:
        raise LayerwiseError(
            f"{what} is of another config ({'; '.join(differing[:4])}): resume with the one it has, or set run.name"
        )


def check_resumable(path: Path, checkpoint_every: int, or_start: bool) -> None:
    """Raises LayerwiseError where a run has no checkpoint: it starts at step 0 where that is asked for and loses nothing."""
    if list_checkpoints(path / "checkpoints"):
        return
    steps = [row.get("step") for row in read_lines(path / "metrics.jsonl")]
    reached = max((step for step in steps if isinstance(step, int)), default=0)
    if checkpoint_every and reached >= checkpoint_every:
        raise LayerwiseError(
            f"run {path} came to step {reached} and has no checkpoint (training.checkpoint_every={checkpoint_every}):"
            " they were deleted, or could not be written; --overwrite starts at step 0 and deletes"
            f" {', '.join(cleared_away(path))}"
        )
    if not or_start:
        there = f"came to step {reached} and has no checkpoint yet" if path.exists() else "does not exist"
        raise LayerwiseError(
            f"--resume: run {path} {there}, so there is nothing to go on from; --resume --or-start starts it at step 0"
        )


def latest_checkpoint(run: Path, identity: dict[str, Any], note: Callable[[str], None]) -> Path | None:
    """The newest good checkpoint of a run, or None where it has none yet.

    A damaged checkpoint is reported through `note` and passed over for the one before it. Raises LayerwiseError where
    every checkpoint is damaged, or where they are of another run.
    """
    damage: list[DamagedCheckpointError] = []
    for path in list_checkpoints(run / "checkpoints"):
        try:
            saved = read_manifest(path).get("identity")
            if not (isinstance(saved, dict) and isinstance(saved.get("config"), dict) and "corpus" in saved):
                raise DamagedCheckpointError(f"checkpoint {path}: it does not say what it belongs to")
            check_same_run(saved["config"], identity["config"], f"checkpoint {path}")
            if saved["corpus"] != identity["corpus"]:
                raise LayerwiseError(f"checkpoint {path} was trained on another text: its hash is another")
            check_hash(path)
        except DamagedCheckpointError as error:
            damage.append(error)
            continue
        for skipped in damage:
            note(f"{skipped}; going on from {path.name}")
        return path
    if damage:
        raise LayerwiseError(f"{damage[0]}; no older one is good: --overwrite starts anew")
    return None
