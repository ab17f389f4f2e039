"""Checkpoints that a run goes on from: whole or absent, and checked before they are used.

    checkpoints/step-00001000/
      manifest.json    size and SHA-256 of every other file, written last
      trainer.json     step, counts, what the guard knows; on how many ranks and which ZeRO stage
      history.pt       loss and gradient norm of every step so far
      rng-00000.pt     a rank's random generators
      state/           DeepSpeed's own files: optimizer states and trained weights, a part a rank

Frozen weights are not in it: they are those of `init_from`, and `trainer.json` holds a checksum of them. A
checkpoint is written under another name, synced to the disk and renamed, so that a kill at any point leaves
the ones before it as they were."""

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import files
from .config import CheckpointConfig
from .distributed import Ranks

MANIFEST, TRAINER, HISTORY, STATE = "manifest.json", "trainer.json", "history.pt", "state"
_NAME = re.compile(r"step-(\d{8})")


class Damaged(ValueError):
    """A checkpoint whose files are not those that were written."""


class Checkpoints:
    """The checkpoints in one folder; every rank makes every call."""

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.folder, self.config, self.ranks = folder, config, ranks

    def is_due(self, step: int, last_step: int) -> bool:
        every = self.config.every_steps
        return step == last_step or (every is not None and step % every == 0)

    def clear(self) -> None:
        """Removes all of them."""
        self.ranks.check_on_first(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def newest(self) -> Path | None:
        """The newest undamaged one; None without any. Damaged ones are named on stderr and renamed.

        ValueError if all of them are damaged: going on from nothing would throw a long run away."""
        names = self.ranks.on_first(self._tidy)
        num_damaged = self.ranks.on_first(lambda: len(list(self.folder.glob("damaged-*"))))
        for name in reversed(names):
            try:
                verify(self.folder / name, self.ranks)
            except Damaged as error:
                self.ranks.check_on_first(lambda name=name, error=error: self._set_aside(name, error))
            else:
                return self.folder / name
        if names or num_damaged:
            rule = "checkpoint.resume must find an undamaged checkpoint"
            raise ValueError(
                f"{rule}, got {len(names) + num_damaged} damaged ones in {str(self.folder)!r}; "
                "checkpoint.resume=false begins the stage anew"
            )
        return None

    def save(self, step: int, num_bytes: int, write: Callable[[Path], None]) -> Path:
        """Writes the checkpoint of `step`, by `write(folder)` on every rank, and removes old ones.

        OSError, with the older checkpoints as they were, if there is no room for about `num_bytes` or a write
        fails."""
        final = self.folder / f"step-{step:08d}"
        unfinished = self.folder / f".{final.name}.unfinished"
        try:
            self.ranks.check_on_first(lambda: _make_room(unfinished, num_bytes))
            write(unfinished)
            self.ranks.barrier()
            entries = self.ranks.on_each(lambda: _synced_share(unfinished, self.ranks))
            self.ranks.check_on_first(lambda: _complete(unfinished, final, entries))
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
            if self.ranks.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            kept = [name for name in _names(self.folder) if name != final.name]
            safe = f"{kept[-1]} is whole" if kept else "there is none before it"
            raise OSError(f"checkpoint {str(final)!r} could not be written, {safe}: {error}") from error
        self.ranks.check_on_first(lambda: self._rotate(step))
        return final

    def _tidy(self) -> list[str]:
        """Removes what a kill left unfinished; names of the checkpoints, oldest first."""
        for path in self.folder.glob(".*"):
            shutil.rmtree(path)
        return _names(self.folder)

    def _set_aside(self, name: str, error: Damaged) -> None:
        aside = self.folder / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.folder / name, aside)
        print(f"train: {error}; it is now {aside.name}, the one before is tried", file=sys.stderr, flush=True)

    def _rotate(self, step: int) -> None:
        names = _names(self.folder)
        every = self.config.keep_every_steps
        for name in names[: -self.config.keep_last]:
            if every is None or _step_of(name) % every:
                # renamed first: a kill in the middle of the removal leaves no checkpoint with files missing
                retired = self.folder / f".{name}.retired"
                os.rename(self.folder / name, retired)
                shutil.rmtree(retired)


def find(folder: Path, ranks: Ranks, *, step: int | None = None) -> Path:
    """The newest undamaged checkpoint in `folder`, or that of `step`; nothing there is changed. ValueError
    if there is none."""
    names = ranks.on_first(lambda: _names(folder))
    wanted = names if step is None else [name for name in names if _step_of(name) == step]
    problems = [f"no {'checkpoint' if step is None else f'one of step {step}'} among {names}"]
    for name in reversed(wanted):
        try:
            verify(folder / name, ranks)
        except Damaged as error:
            problems.append(str(error))
        else:
            return folder / name
    raise ValueError(f"checkpoints must hold an undamaged one, got {problems[-1]} in {str(folder)!r}")


def verify(folder: Path, ranks: Ranks) -> None:
    """`Damaged`, on every rank, unless all files are those of the manifest; the ranks share the reading."""

    def check() -> str | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())["files"]
            present = [name for name in files.files_below(folder) if name != MANIFEST]
            if present != sorted(manifest):
                missing, foreign = sorted(manifest.keys() - present), sorted(set(present) - manifest.keys())
                return f"files must be those of {MANIFEST}, got {missing} missing and {foreign} more"
            for name in present[ranks.rank :: ranks.world_size]:
                if os.path.getsize(folder / name) != manifest[name]["bytes"]:
                    return f"{name} must have {manifest[name]['bytes']} bytes, got another size"
                if files.sha256(folder / name) != manifest[name]["sha256"]:
                    return f"{name} must have the SHA-256 of {MANIFEST}, got another"
            if read_trainer(folder)["step"] != _step_of(folder.name):
                return f"{TRAINER} must be of its folder's step, got another"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"{MANIFEST} must be readable, got {type(error).__name__}: {error}"
        return None

    for problem in ranks.gather_objects(check()):
        if problem is not None:
            raise Damaged(f"checkpoint {str(folder)!r} is damaged: {problem}")


def read_trainer(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINER).read_text())


def write_trainer(folder: Path, values: dict[str, Any], losses: list[float], grad_norms: list[float]) -> None:
    files.write_json(folder / TRAINER, values)
    history = {"losses": losses, "grad_norms": grad_norms}
    torch.save(
        {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in history.items()},
        folder / HISTORY,
    )


def read_history(folder: Path) -> tuple[list[float], list[float]]:
    history = torch.load(folder / HISTORY, weights_only=True)
    return history["losses"].tolist(), history["grad_norms"].tolist()


def seed_generators(seed: int) -> None:
    """Of torch, NumPy and Python, for models or data that draw from them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def write_generators(folder: Path, ranks: Ranks) -> None:
    version, words, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None,
        "numpy": (version, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }
    torch.save(states, folder / _generators_name(ranks.rank))


def read_generators(folder: Path, ranks: Ranks) -> None:
    """Sets this rank's generators; a rank that the checkpoint does not know keeps its own."""
    path = folder / _generators_name(ranks.rank)
    if not path.is_file():
        return
    states = torch.load(path, weights_only=True)
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    version, words, *rest = states["numpy"]
    np.random.set_state((version, words.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


def _generators_name(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _make_room(unfinished: Path, num_bytes: int) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    free = shutil.disk_usage(unfinished).free
    if free < num_bytes:
        raise OSError(f"the disk must have room for {num_bytes:,} bytes, got {free:,}")


def _synced_share(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    entries = {}
    for name in files.files_below(folder)[ranks.rank :: ranks.world_size]:
        path = folder / name
        files.sync(path)
        entries[name] = {"bytes": os.path.getsize(path), "sha256": files.sha256(path)}
    return entries


def _complete(unfinished: Path, final: Path, entries: list[dict[str, dict[str, Any]]]) -> None:
    merged = {name: entry for share in entries for name, entry in share.items()}
    files.write_json(unfinished / MANIFEST, {"files": dict(sorted(merged.items()))})
    files.sync(unfinished / STATE)
    if final.exists():
        shutil.rmtree(final)
    os.rename(unfinished, final)
    files.sync(final.parent)
