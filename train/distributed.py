"""The process group: one rank without a launcher, or the ranks that DeepSpeed's launcher or torchrun
started."""

import dataclasses
import datetime
import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    # read when DeepSpeed is imported; without it DeepSpeed warns that it found no accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402

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

    def barrier(self) -> None:
        self.sum([0.0])


def start() -> Ranks:
    """Joins the process group, once a process: gloo on the CPU, NCCL on GPUs.

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
    """Leaves the process group; for the end of a process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
