"""The process group: one rank without a launcher, or the ranks that DeepSpeed's launcher or torchrun
started."""

import dataclasses
import datetime
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():
    # read when DeepSpeed is imported; without it DeepSpeed warns that it found no accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402

T = TypeVar("T")
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, exact for integers below 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, values: list[float]) -> list[list[float]]:
        """The `values` of every rank, exact for integers below 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        by_rank = torch.empty(self.world_size * len(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_gather_into_tensor(by_rank, tensor)
        return by_rank.view(self.world_size, -1).tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        by_rank: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(by_rank, value)
        return by_rank

    def on_first(self, call: Callable[[], T]) -> T:
        """What `call` gives on rank 0, whose view of the file system decides; its error stops every rank."""
        answer: list[Any] = [None, None, ""]
        if self.rank == 0:
            try:
                answer[0] = call()
            except (ValueError, OSError, RuntimeError) as error:
                answer[1:] = (OSError if isinstance(error, OSError) else ValueError), str(error)
        torch.distributed.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1](answer[2])
        return answer[0]

    def check_on_first(self, check: Callable[[], None]) -> None:
        self.on_first(check)

    def on_each(self, call: Callable[[], T]) -> list[T]:
        """What `call` gives on every rank; an error of any of them is raised on all."""
        answer: tuple[Any, str | None] = (None, None)
        try:
            answer = call(), None
        except (ValueError, OSError, RuntimeError) as error:
            answer = None, f"{error}" if self.world_size == 1 else f"{error} (rank {self.rank})"
        answers = self.gather_objects(answer)
        for _, error in answers:
            if error is not None:
                raise OSError(error)
        return [value for value, _ in answers]

    def barrier(self) -> None:
        self.sum([0.0])


def start() -> Ranks:
    """Joins the process group, if this process has not yet: gloo on the CPU, NCCL on GPUs.

    The launcher's environment says which rank this is; without one it is a group of its own."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by their older names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed asserts that it is set
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not cuda:
        # DeepSpeed would compile a shared-memory collective at the first start: half a minute, and a build
        # that is killed leaves a lock that every later start waits for
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def stop() -> None:
    """Leaves the process group; `start` may make another one."""
    if deepspeed.comm.is_initialized():
        # torch's own call would leave DeepSpeed with the handles of dead groups for the next `start`
        deepspeed.comm.destroy_process_group()
