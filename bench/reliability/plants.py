"""Bugs that are planted into the forked ranks, to show that the cases find such bugs (`--plant NAME`)."""

import time
from collections.abc import Callable


def shifted_data() -> None:
    """A resumed run reads one batch again."""
    from train.batch import StepReader
    from train.stage import Stage

    load, read = Stage.load, StepReader.__call__

    def wrong(self, folder):
        load(self, folder)
        StepReader.__call__ = lambda reader, step: read(reader, step - 1)

    Stage.load = wrong


def lost_moments() -> None:
    """A resumed run has AdamW's second moments a little off."""
    from train.stage import Stage

    load = Stage.load

    def wrong(self, folder):
        load(self, folder)
        for slot in self.optimizer.state.values():
            slot["exp_avg_sq"].mul_(1.001)

    Stage.load = wrong


def unchecked() -> None:
    """Checkpoints are loaded as they are."""
    import train.checkpoint

    train.checkpoint.verify = lambda folder, ranks: None


def waits_without_images() -> None:
    """A rank without an image in a forward waits, as one whose collectives nobody joins."""
    import torch

    from model import InfiMMHD

    forward = InfiMMHD.forward

    def wrong(self, *arguments, pixel_values=None, **keywords):
        if pixel_values is None and torch.distributed.get_world_size() > 1:
            time.sleep(10**6)
        return forward(self, *arguments, pixel_values=pixel_values, **keywords)

    InfiMMHD.forward = wrong


def deaf() -> None:
    """The loop hears no SIGTERM and no SIGINT."""
    from train.interrupt import StopSignals

    StopSignals._receive = lambda self, number, frame: None


PLANTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant for plant in (shifted_data, lost_moments, unchecked, waits_without_images, deaf)
}
