"""`layerwise train` with one process that stops at a chosen moment: killed_lab.py MOMENT RANK train CONFIG ..."""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from layerwise.lab.cli import main
from layerwise.lab.runs import checkpoint
from layerwise.lab.training import processes
from layerwise.lab.training.trainer import Trainer

STEP = 6  # a checkpoint of step 3 stands, the next one is due now


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, act: Callable[[], None], due: Callable[..., bool]) -> None:
    """Puts `act` before a function, for the calls that are due."""
    real = getattr(owner, name)

    def changed(*args: Any, **keywords: Any) -> Any:
        if due(*args, **keywords):
            act()
        return real(*args, **keywords)

    setattr(owner, name, changed)


def before_update(act: Callable[[], None], step: int) -> None:
    """Puts `act` between the gradients of a step and its update."""
    steps = itertools.count(1)
    register_optimizer_step_pre_hook(lambda *_: act() if next(steps) == step else None)


def half_written(real: Callable[..., None], step: int) -> Callable[..., None]:
    def save(state: Any, file: Any, **keywords: Any) -> None:
        if not (isinstance(state, dict) and state.get("step") == step):  # tensors are pickled by it too
            real(state, file, **keywords)
            return
        whole = io.BytesIO()
        real(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    return save


def prepare(moment: str, step: int) -> None:
    """This process will be killed, or hang, at the moment."""
    name = f"step-{step:08d}"
    if moment == "train":
        before_update(die, step)
    elif moment == "hang":
        before_update(lambda: time.sleep(1e6), step)
    elif moment == "gather":  # while the others wait for this one's part of the checkpoint
        before(Trainer, "_save", die, lambda trainer: trainer.step == step)
    elif moment == "write":
        torch.save = half_written(torch.save, step)
    elif moment == "manifest":  # the state is written, and nothing says that it is complete
        before(checkpoint, "write_json", die, lambda path, value: value.get("step") == step)
    elif moment == "rename":  # all is written, under another name
        before(checkpoint, "_remove", die, lambda path: path.name == name)
    else:
        assert moment == "renamed"  # and the older ones not yet removed
        before(checkpoint, "_sync_folder", die, lambda folder: (folder / name).exists())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if processes.rank() == int(sys.argv[2]):
        prepare(sys.argv[1], STEP)
    main(sys.argv[3:])
