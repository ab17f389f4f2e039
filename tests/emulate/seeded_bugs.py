"""A copy of the device code with one bug in it, and whether the emulation notices."""

import faulthandler
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.emulate.add_position_2d import CSRC

LIMIT_S = 600  # of a machine that does other things too


def copy_with_bug(folder: Path, files: Sequence[str], old: str, new: str) -> Path:
    """csrc in `folder` with `new` in the place of the only `old` in `files`, which are patterns."""
    csrc = folder / "csrc"
    if not csrc.exists():
        shutil.copytree(CSRC, csrc)
    hits = [path for pattern in files for path in csrc.glob(pattern) if old in path.read_text()]
    count = sum(path.read_text().count(old) for path in hits)
    assert count == 1, f"the bug must fit one place, it fits {count}: {hits}"
    hits[0].write_text(hits[0].read_text().replace(old, new))
    return csrc


def is_caught(check: Callable[[], None]) -> bool:
    """Whether `check` fails. It runs in a child process: a stray store may end that."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        faulthandler.disable()  # pytest's report of a crash
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # the threads of the parent are not here
        caught = False
        try:
            check()
        except (AssertionError, RuntimeError):
            caught = True
        finally:
            os._exit(1 if caught else 0)
    status = os.waitpid(child, 0)[1]
    ran_too_long = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    assert not ran_too_long, f"the check ran for more than {LIMIT_S} s"
    return status != 0
