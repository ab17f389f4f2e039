"""Ranks as forks of one process that has imported everything: a start takes milliseconds instead of seconds.

The parent keeps no process group and starts no thread, so that a fork is as good as a new process."""

import ctypes
import dataclasses
import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

limit_s = 60.0
"""A run that says nothing for longer hangs; every step of one says something."""
_PATIENCE_S = 1.0
"""Between SIGTERM and SIGKILL to the ranks that outlive another one."""
_SHOWN_LINES = 8
_PORTS = itertools.count()
_FIRST_PORT, _PORTS_PER_WORKER = 12_000, 4_000  # below the ports that Linux gives away by itself
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_PDEATHSIG = 1
_MODULES = (
    "setuptools",  # before distutils
    *("train.engine", "train.__main__", "bench.reliability.tiny", "torch.utils.tensorboard"),
    # imported at a rank's start; the first one imports torch's compiler
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer"),
)
_worker = 0


def import_all() -> None:
    """Once, in the parent: what a rank needs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    for module in _MODULES:
        importlib.import_module(module)
    importlib.import_module("PIL.Image").init()
    importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - looks for compilers, once
    gc.collect()
    gc.freeze()  # the forks share these pages as long as nobody touches them


@dataclasses.dataclass(frozen=True, slots=True)
class Strike:
    """A signal from outside: `number` to `rank`, `delay_s` after the start."""

    delay_s: float
    rank: int
    number: int = signal.SIGKILL


@dataclasses.dataclass(slots=True)
class Ended:
    """How the ranks of a run ended."""

    codes: list[int]
    """Exit codes by rank; minus the number of the signal that ended a rank."""
    first: int
    """The rank that ended first."""
    seconds: float
    hung: bool
    said: list[str]
    """What each rank printed."""

    @property
    def good(self) -> bool:
        return not self.hung and not any(self.codes)

    def __str__(self) -> str:
        names = (signal.Signals(-code).name if code < 0 else str(code) for code in self.codes)
        said = ""
        for rank, text in enumerate(self.said):
            lines = text.strip().splitlines()[-_SHOWN_LINES:]
            said += f"\n    rank {rank}:" + "".join(f"\n      {line}" for line in lines)
        return f"exit codes {', '.join(names)}{', hung' if self.hung else ''}{said}"


def run_ranks(
    body: Callable[[int], int],
    world_size: int,
    said: Path,
    *,
    strike: Strike | None = None,
    grace_s: float = 10.0,
) -> Ended:
    """Runs `body(rank)` in a fork for each rank until all have ended; what it returns is the exit code.

    When a rank has failed, the others get SIGTERM after `grace_s` and SIGKILL a second later, as launchers do
    it. They print to `said`-0.txt and so on."""
    environment = {}
    if world_size > 1:
        port = str(_free_port())
        environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = time.monotonic()
    texts = [said.with_name(f"{said.name}-{rank}.txt") for rank in range(world_size)]
    for text in texts:
        text.write_text("")
    pids = [_fork(body, rank, environment, text) for rank, text in enumerate(texts)]
    codes, order, hung = _wait(pids, texts, start, strike, grace_s)
    seconds = time.monotonic() - start
    return Ended(codes, order[0], seconds, hung, [text.read_text(errors="replace") for text in texts])


def _fork(body: Callable[[int], int], rank: int, environment: dict[str, str], said: Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _end_with(parent)
        for variable in _RANK_VARIABLES:
            os.environ.pop(variable, None)
        if environment:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        output = os.open(said, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        # over those of the parent, which may be a test's
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        # renews torch's thread pool, which does so at its first use after a fork: two threads at once would
        # find none
        sys.modules["torch"].set_num_threads(1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = body(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(
    pids: list[int], texts: list[Path], start: float, strike: Strike | None, grace_s: float
) -> tuple[list[int], list[int], bool]:
    """Exit codes, ranks in the order of their ends, and whether the time was up."""
    codes, order = [0] * len(pids), []
    alive = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    poll = select.poll()
    for descriptor in alive:
        poll.register(descriptor, select.POLLIN)
    deadlines = [(start + limit_s, "limit", signal.SIGKILL)]
    if strike is not None:
        deadlines.append((start + strike.delay_s, "strike", strike.number))
    hung = False
    while alive:
        deadlines.sort()
        for descriptor, _ in poll.poll(max(0.0, deadlines[0][0] - time.monotonic()) * 1000):
            poll.unregister(descriptor)
            os.close(descriptor)
            rank = alive.pop(descriptor)
            order.append(rank)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
            if codes[rank] and not any(codes[other] for other in order[:-1]):
                end = time.monotonic() + grace_s
                deadlines += [(end, "end", signal.SIGTERM), (end + _PATIENCE_S, "end", signal.SIGKILL)]
        while alive and deadlines[0][0] <= (now := time.monotonic()):
            _, kind, number = deadlines.pop(0)
            if kind == "limit":
                silent_s = time.time() - max(text.stat().st_mtime for text in texts)
                hung = silent_s >= limit_s
                deadlines.append((now + limit_s - (0.0 if hung else silent_s), kind, number))
                if not hung:
                    continue
            for rank in alive.values():
                if kind != "strike" or rank == strike.rank:
                    os.kill(pids[rank], number)
    return codes, order, hung


def _free_port() -> int:
    while True:
        number = (os.getpid() + next(_PORTS)) % _PORTS_PER_WORKER
        port = _FIRST_PORT + _worker % 4 * _PORTS_PER_WORKER + number
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Workers:
    """Runs cases side by side, in `number` forks of this process that fork ranks themselves."""

    def __init__(self, number: int) -> None:
        self.number = number

    def map(self, call: Callable[[Any], Any], cases: Iterable[Any]) -> Iterator[Any]:
        """`call(case)` of each, as they are ready. RuntimeError with the traceback if one raises."""
        context = multiprocessing.get_context("fork")
        waiting, processes = iter(cases), {}
        for worker in range(self.number):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(call, there, worker))
            process.start()
            there.close()
            processes[here] = process
        try:
            busy = [pipe for pipe in processes if self._send(pipe, waiting)]
            while busy:
                for pipe in multiprocessing.connection.wait(busy):
                    result, error = pipe.recv()
                    if error is not None:
                        raise RuntimeError(error)
                    if not self._send(pipe, waiting):
                        busy.remove(pipe)
                    yield result
        finally:
            for pipe, process in processes.items():
                pipe.close()
                process.terminate()  # its ranks end with it
                process.join()

    @staticmethod
    def _send(pipe: multiprocessing.connection.Connection, waiting: Iterator[Any]) -> bool:
        for case in waiting:
            pipe.send(case)
            return True
        return False


def _serve(call: Callable[[Any], Any], pipe: multiprocessing.connection.Connection, worker: int) -> None:
    global _worker
    _worker = worker
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            answer = call(case), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)
