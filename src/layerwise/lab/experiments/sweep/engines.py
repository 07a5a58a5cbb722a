"""Where the trials of a sweep run: in this process, in processes beside it, or on a Ray cluster.

An engine's `results` runs a function of an item, and of how many threads it may use, on items: each comes back with what the
function returned, or with the reason why it has no result, in the order they end. All three must be picklable. An exception
or a killed process fails its own item and no other. Closing the iterator, as an interruption does, abandons what is running.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from threading import Event
from typing import Any, TypeVar

import torch

from layerwise.errors import LayerwiseError

Item = TypeVar("Item")
Row = dict[str, Any]
Work = Callable[[Item, int], Row]  # of an item and a number of threads

#: An item whose process or machine dies is run this often before it is given up.
ATTEMPTS = 2
#: Of the local start: rows are small, and Ray's default is 30 % of the memory.
OBJECT_STORE = 100 * 2**20


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LayerwiseError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class LocalEngine:
    """`workers` processes of one thread each; 0: this process."""

    workers: int = 2

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise LayerwiseError(f"--workers {self.workers}: use 1 or more, or 0 for this process")

    def results(self, function: Work[Item], items: Sequence[Item]) -> Iterator[tuple[Item, Row | str]]:
        if self.workers == 0:
            for item in items:
                try:
                    yield item, function(item, torch.get_num_threads())
                except Exception as error:
                    yield item, reason(error)
            return
        idle: list[ProcessPoolExecutor] = []
        stopped = Event()
        with ThreadPoolExecutor(self.workers) as threads:
            waited_for = {threads.submit(_beside, idle, stopped, function, item): item for item in items}
            try:
                for ended in as_completed(waited_for):
                    yield waited_for[ended], ended.result()
            finally:
                stopped.set()
                threads.shutdown(cancel_futures=True)
                for process in idle:
                    process.shutdown()


def _beside(idle: list[ProcessPoolExecutor], stopped: Event, function: Work[Item], item: Item) -> Row | str:
    """In an idle process, or a new one: each is a pool of its own, so that one that is killed takes no other with it."""
    for _ in range(ATTEMPTS):
        if stopped.is_set():
            break
        process = idle.pop() if idle else ProcessPoolExecutor(1, get_context("spawn"))
        try:
            row: Row | str = process.submit(function, item, 1).result()
        except BrokenProcessPool:
            process.shutdown()
            continue
        except Exception as error:
            row = reason(error)
        idle.append(process)
        return row
    return f"its process was killed {ATTEMPTS} times (out of memory?)"


@dataclass(frozen=True)
class RayEngine:
    """Tasks on a Ray cluster that each need `cpus` cores (and run as many threads) and `gpus` GPUs, which may be fractions.

    Tasks and not Ray Tune: its trials are points of a search space that is fixed when it starts, known by their place in
    its own store and resumed from there. Ours are known by what they are (the hash of their config), so that a sweep can
    be resumed with more rates or sizes, under either engine, and nothing has to lie on a disk that all machines see.

    `address`: of a running cluster, `auto` for the one this machine belongs to; None: `RAY_ADDRESS`, or else a Ray
    started here and ended with the sweep. A Ray that this process has initialised already is used as it is.
    `workers`: tasks at a time at most; None: as many as fit.
    """

    cpus: float = 1
    gpus: float = 0
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise LayerwiseError(f"--workers {self.workers}: use 1 or more with --engine ray")
        for name, value in (("--cpus", self.cpus), ("--gpus", self.gpus)):
            if value < 0 or not math.isfinite(value) or (value > 1 and value != int(value)):
                raise LayerwiseError(f"{name} {value:g}: use a whole number or a fraction below 1")

    def results(self, function: Work[Item], items: Sequence[Item]) -> Iterator[tuple[Item, Row | str]]:
        try:
            import ray
        except ImportError:
            raise LayerwiseError("--engine ray needs Ray: pip install 'layerwise[ray]'") from None
        with self._connected(ray):
            self._check_room(ray)
            work = _task(function, threads=max(1, int(self.cpus)), sees_gpus=self.gpus > 0)
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(work)
            waiting = deque((item, 1) for item in items)
            running: dict[Any, tuple[Item, int]] = {}
            try:
                while waiting or running:
                    while waiting and (self.workers is None or len(running) < self.workers):
                        item, attempt = waiting.popleft()
                        running[task.remote(item)] = item, attempt
                    [done], _ = ray.wait(list(running), num_returns=1)
                    item, attempt = running.pop(done)
                    try:
                        yield item, ray.get(done)
                    except ray.exceptions.RayTaskError as error:  # the function raised it
                        yield item, reason(error.cause)
                    except ray.exceptions.RayError as error:  # its process or machine died
                        if attempt < ATTEMPTS:
                            waiting.append((item, attempt + 1))
                        else:
                            yield item, f"died {attempt} times: {reason(error)[:300]}"
            finally:
                for unfinished in running:
                    ray.cancel(unfinished, force=True)

    @contextlib.contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
            if self.workers is not None:
                options["num_cpus"] = math.ceil(self.workers * self.cpus)
        try:
            ray.init(address=address, **options)
        except Exception as error:  # of no class of its own where its start takes longer than 30 s
            raise LayerwiseError(f"Ray at {address}: {reason(error)[:300]}") from None
        try:
            yield
        finally:
            ray.shutdown()

    def _check_room(self, ray: Any) -> None:
        """A task that fits no machine would wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            return
        room = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        problem = f"--cpus {self.cpus:g} --gpus {self.gpus:g}: no machine has as many, there are {room}"
        if len(nodes) == 1 and self.address is None:
            raise LayerwiseError(problem)
        print(f"{problem}; trials wait until the cluster grows", file=sys.stderr, flush=True)


def _task(function: Work[Item], threads: int, sees_gpus: bool) -> Callable[[Item], Row]:
    """`function`, as a process on any machine runs it."""
    folder = os.getcwd()

    def run(item: Item) -> Row:
        if not sees_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with contextlib.suppress(OSError):  # paths in a config are relative to it, where machines share it
            os.chdir(folder)
        return function(item, threads)

    return run


Engine = LocalEngine | RayEngine
