"""What all cases share: where they write, how they are drawn, the runs they are compared with."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

from . import faults, tiny
from .runs import Layout, Outcome, Reference, Run, read_record

RECIPES = ("PT", "CPT", "DRA", "IFT")
LAYOUTS = (
    *(Layout(world_size, zero_stage) for zero_stage in (3, 2, 1, 0) for world_size in (2, 1)),
    *(Layout(2, 2, "bf16"), Layout(1, 3, "bf16")),
)
STEPS = 6
SETTINGS = {
    "schedule__steps": STEPS,
    "parallel__global_batch_size": 4,
    "parallel__gradient_accumulation_steps": None,
    "parallel__max_micro_batch_size": 2,
    "checkpoint__every_steps": 2,
    "checkpoint__keep_last": 2,
    "data__on_bad_sample": "skip",
    "data__max_skipped_share": 0.5,
    "image__max_windows_per_side": 2,
    "tensorboard": False,
    "log_interval": 1,
}
BY_RECIPE = {
    "PT": {"tensorboard": True},
    "CPT": {"data__workers": 1},
    "DRA": {"data__workers": 2},
    "IFT": {"checkpoint__keep_last": 1},
}
SAMPLES = (1, 0, 2, 1, None, 1, 3, 0, 1, 1, 2, None, 1, 0, 1, 1, 4, 1, 1)
"""Images of the records, None for a bad one: fewer than a stage reads, so that a second epoch begins."""


@dataclasses.dataclass(slots=True)
class Room:
    folder: Path
    seed: int
    quick: bool
    material: dict[str, Any]
    """Model, tokenizer and data of all runs, as overrides of `tiny.tiny_config`."""
    references: dict[tuple[Layout, str], Reference] = dataclasses.field(default_factory=dict)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (Layout(2, 3), Layout(1, 2)) if self.quick else LAYOUTS

    @property
    def recipes(self) -> tuple[str, ...]:
        return ("CPT",) if self.quick else RECIPES

    def draw(self, kind: str, case: int | str) -> random.Random:
        """The same for a case in every run of the same seed."""
        return random.Random(f"{self.seed} {kind} {case}")

    def new_folder(self, kind: str, case: int) -> Path:
        folder = self.folder / kind / str(case)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def reference(self, layout: Layout, recipe: str) -> Reference:
        """The uninterrupted run, where `measure` has not made it for every case."""
        if (layout, recipe) not in self.references:
            self.references |= measure(self, layout)
        return self.references[layout, recipe]


def make_room(folder: Path, *, seed: int, quick: bool) -> Room:
    data = tiny.write_mixed_conversations(folder / "data", SAMPLES, sides=(28, 56, 100))
    material = SETTINGS | tiny.write_start(folder / "start") | {"data__path": str(data)}
    return Room(folder, seed, quick, material)


def measure(room: Room, layout: Layout) -> dict[tuple[Layout, str], Reference]:
    """The stages, each from the one before; RuntimeError if one does not end well."""
    found, start = {}, {}
    for recipe in room.recipes:
        overrides = room.material | BY_RECIPE[recipe] | start
        run = Run(recipe, layout, room.folder / "references" / str(layout) / recipe, overrides)
        ended = run.start(lambda rank, run=run: faults.count_into(_calls(run, rank), run.output_dir))
        if not (ended.good and run.finished):
            raise RuntimeError(f"{recipe} on {layout} must end well when it is left alone, got {ended}")
        calls = [json.loads(_calls(run, rank).read_text()) for rank in range(layout.world_size)]
        record = read_record(run.output_dir)
        found[layout, recipe] = Reference(record, calls, ended.seconds, overrides, run.output_dir)
        start = {"init_from": str(run.output_dir)}
    return found


def _calls(run: Run, rank: int) -> Path:
    return run.folder / f"calls-{rank}.json"


def tidy(folder: Path, outcome: Outcome) -> Outcome:
    """Removes the folder of a case that passed."""
    if not outcome.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome
