"""All of a miniature: warm-up, features, arms, in as many processes as the size says.

Each piece is kept when it is done: the same command goes on where a run was ended."""

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.cross_attention import cpu_model

from . import features, resampler, training, warmup
from .arms import ARMS, RESAMPLERS, RESOLUTIONS
from .features import SeenPages
from .scores import with_scores
from .sizes import Size
from .storage import load_json, load_tensors
from .training import evaluation_samples

Job = tuple[str, Callable[..., None], tuple]
"""Name, function, arguments."""


def device_of(size: Size) -> torch.device:
    """The GPU where there is one, for every size; a size made for one runs on a CPU too, in days."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runs_of(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int, str]]:
    """(arm, seed, match), the longest ones first, so that the last to end are short."""
    last = RESOLUTIONS[-1]
    found = [(arm, seed, "compute") for arm in RESOLUTIONS if arm in arms and arm != last for seed in seeds]
    order = ("mixture-of-resolution", "llava-style", "interval-2", "dynamic", "dynamic-no-position")
    ordered = [*order, *(arm for arm in ARMS if arm not in order)]
    found = [(arm, seed, "steps") for arm in ordered if arm in arms for seed in seeds] + found
    weight = {"mixture-of-resolution": 3, "llava-style": 2}
    return sorted(found, key=lambda run: -weight.get(run[0], 2 if run[2] == "compute" else 1))


def run_all(size: Size, arms: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Leaves the results of `arms` x `seeds` in `folder`. RuntimeError naming the piece that failed."""
    device, warm_up = device_of(size), folder / "warm_up"
    first = [part for part in warmup.PARTS if part != "vision_low"]
    for parts in (first, ["vision_low"]):  # which starts from "vision"
        jobs = [
            (f"warm-up of {part}", warmup.PARTS[part], (size, warm_up, device))
            for part in parts
            if not (warm_up / f"{part}.pt").exists()
        ]
        _side_by_side(jobs, size.arms_at_once)
    views = sorted({ARMS[arm].view for arm in arms} | {"low"})
    jobs = [
        (f"features {view} {split}", features.compute, (size, view, split, folder, device))
        for view in views
        for split in features.SPLITS
        if not (folder / "features" / f"{view}-{split}.pt").exists()
    ]
    _side_by_side(jobs, size.arms_at_once)
    jobs = [
        (f"warm-up of {part}", resampler.warm_up_resampler, (size, folder, device, arm))
        for arm, part in RESAMPLERS.items()
        if arm in arms and not (warm_up / f"{part}.pt").exists()
    ]
    _side_by_side(jobs, size.arms_at_once)
    jobs = [
        (f"{arm}, seed {seed}, equal {match}", training.run_arm, (size, arm, seed, match, folder, device))
        for arm, seed, match in runs_of(arms, seeds)
        if not (folder / "arms" / f"{arm}-{seed}-{match}.json").exists()
    ]
    _side_by_side(jobs, size.arms_at_once)


def _side_by_side(jobs: Sequence[Job], processes: int) -> None:
    """Runs jobs in processes of one thread each on a CPU."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=_one_thread)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        futures = {pool.submit(_named, *job): job[0] for job in jobs}
        wait(futures, return_when=FIRST_EXCEPTION)
        for future, name in futures.items():
            if future.done() and future.exception() is not None:
                raise RuntimeError(f"{name} failed: {future.exception()}") from future.exception()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _named(name: str, function: Callable[..., None], arguments: tuple) -> None:
    function(*arguments)
    print(f"done: {name}", flush=True)


def document(size: Size, folder: Path, command: str) -> dict[str, Any]:
    """What `folder` holds so far, and all that scores, plots and card are made of."""
    device = device_of(size)
    words = SeenPages(folder, "low", "held_out").words
    asked = evaluation_samples(words)
    last = [(sample[-1][0], sample[-1][1][-1]) for _, sample in asked]
    sizes = [words[page][q.target].font_size if q.target is not None else 0 for page, q in last]
    parts = [*warmup.PARTS, *RESAMPLERS.values()]
    paths = {part: folder / "warm_up" / f"{part}.pt" for part in parts}
    warm_up = {part: load_tensors(path) for part, path in paths.items() if path.exists()}
    found = {
        "header": _header(device, command),
        "size": dataclasses.asdict(size),
        "order": list(ARMS),
        "stands_for": {name: arm.paper for name, arm in ARMS.items()},
        "warm_up": {
            part: {
                "accuracy": kept["accuracy"],
                "steps": len(kept["loss"]),
                "seconds": round(kept["seconds"], 1),
            }
            for part, kept in warm_up.items()
        },
        "questions": {
            "kind": [kind for kind, _ in asked],
            "page": [page for page, _ in last],
            "font_size": sizes,
            "text": [q.text for _, q in last],
            "answer": [q.answer for _, q in last],
        },
        "arms": [load_json(path) for path in sorted((folder / "arms").glob("*.json"))],
    }
    return with_scores(found)


def _header(device: torch.device, command: str) -> dict[str, Any]:
    header = results.header(device, command, 0.0)
    wanted = ("torch", "python", "commit", "command", "date")
    processor = header["gpu"] if device.type == "cuda" else cpu_model()
    return {"processor": processor, **{name: header[name] for name in wanted}}
