"""A run under torchrun whose last process is killed at a chosen moment: python killed_run.py FOLDER train|save."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_runs import make, train
from torch.distributed.checkpoint.state_dict import get_state_dict

KILLED_AT = 3  # steps 0, 1, 2 are done, and a checkpoint stands after each of the first two


def main(folder: Path, moment: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    model, optimizer = make("fsdp")
    for step in range(100):
        train(model, optimizer, range(step, step + 1))
        doomed = step + 1 == KILLED_AT and dist.get_rank() == dist.get_world_size() - 1
        if doomed and moment == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        if doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        dcp.save(state, checkpoint_id=folder / "unfinished")
        if dist.get_rank() == 0:
            (folder / "unfinished").rename(folder / f"step-{step + 1}")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
