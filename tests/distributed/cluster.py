"""A few processes that stand in for machines: started once, they run one function after another as a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "layerwise",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "distributed_runs",
    "lab_runs",
    "transformers.models.gpt2.modeling_gpt2",
]


class Cluster:
    """``size`` processes; ``run(world, f, *args)`` calls ``f(*args)`` on the first ``world`` of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.context = multiprocessing.get_context("forkserver")  # imports torch once, not once a process
        self.context.set_forkserver_preload(PRELOADED)
        self.members: list[Any] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 100) -> list[Any]:
        """The results by rank. Any error on any rank is raised here; a rank that does not answer ends the cluster."""
        if not self.members:
            self.members = [self._start() for _ in range(self.size)]
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self.members[:world]):
                pipe.send((rank, world, str(Path(folder, "rendezvous")), function, args))
            answers = []
            for rank, (_, pipe) in enumerate(self.members[:world]):
                if not pipe.poll(timeout):
                    self.stop()
                    raise TimeoutError(f"rank {rank} of {world} did not answer within {timeout} s")
                answers.append(pipe.recv())
        for rank, (failed, value) in enumerate(answers):
            if failed:
                raise RuntimeError(f"rank {rank} of {world}:\n{value}")
        return [value for _, value in answers]

    def stop(self) -> None:
        for process, _ in self.members:
            process.kill()
            process.join()
        self.members = []

    def _start(self) -> tuple[Any, Any]:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        return process, here


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, file, function, args = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        try:
            if world > 1:
                dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
