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
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.runs = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """The results by rank; an error on any rank is raised here. A rank that ends or does not answer stops them all."""
        if not self.members:
            self._start()
        self.runs += 1
        file = str(Path(self.folder.name, f"rendezvous_{self.runs}"))
        try:
            for rank, (_, pipe) in enumerate(self.members[:world]):
                pipe.send((rank, world, file, function, args))
            answers = [self._answer(rank, world, timeout) for rank in range(world)]
        except BaseException:
            self.stop()  # answers of this run must not be taken for those of the next
            raise
        for rank, (failed, value) in enumerate(answers):
            if failed:
                raise RuntimeError(f"rank {rank} of {world}:\n{value}")
        return [value for _, value in answers]

    def _answer(self, rank: int, world: int, timeout: float) -> tuple[bool, Any]:
        process, pipe = self.members[rank]
        if not pipe.poll(timeout):
            raise TimeoutError(f"rank {rank} of {world} did not answer within {timeout} s")
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            process.join(10)
            raise RuntimeError(f"rank {rank} of {world} ended with exit code {process.exitcode}") from error

    def stop(self) -> None:
        for process, _ in self.members:
            process.kill()
            process.join()
        self.members = []
        if self.folder is not None:
            self.folder.cleanup()

    def _start(self) -> None:
        # A process group that is collected late opens its rendezvous file again and ends the process where it is gone:
        # the files stay as long as the processes do.
        self.folder = tempfile.TemporaryDirectory()
        for _ in range(self.size):
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self.members.append((process, here))


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    longest = timedelta(seconds=240)
    while True:
        try:
            rank, world, file, function, args = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        try:
            if world > 1:
                dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world, timeout=longest)
                dist.barrier()  # a rank that is done at once must not close connections that another is still making
            answer = False, function(*args)
        except BaseException:
            answer = True, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)
