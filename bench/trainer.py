"""What the trainer costs: its loop, its reading, and whether a long run stays flat.

    python -m bench.trainer [overhead] [loader] [soak] [--steps N] [--json] [--save]

overhead  Step time of the DeepSpeed loop (`train.engine.run`, fp32, one rank) over that of a bare PyTorch
          loop (bench/plain_trainer.py): the same model of 23 million parameters, the same batches. ZeRO 0 is
          the same work, and what is held to the limit; ZeRO 2 also copies gradients and weights into flat
          partitions, of which one rank has nothing.
          The two run in turns; the ratio is of the medians of all steps but each run's first ones. Both read
          their batches between the steps. That they did the same work is checked: their losses agree.
loader    Samples and images per second that the step reader prepares in 0, 1 and 2 worker threads, from JPEG
          photographs, at the windows of the step above and at the paper's (448 pixels, up to 3 x 3 and a
          thumbnail); beside it what that step takes, without its reading.
soak      --steps steps of a tiny stage on JPEG files with two workers: resident memory and open file handles
          along the way. Slopes are least squares over all but the first quarter.

Without a name all three run. A busy machine makes all of it worse: measure on an idle one. --save keeps the
document in bench/results/trainer and writes README.md's block from it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.cross_attention import cpu_model
from bench.images import PHOTOGRAPHS
from bench.plain_trainer import train_plainly
from bench.trainer_stage import (
    BATCH,
    MEDIUM,
    STEP_WINDOW,
    TINY,
    build_model,
    stage_config,
    step_reader,
    write_conversations,
)
from train.batch import prefetched
from train.data import Dataset, Sample
from train.demo.vocabulary import build_tokenizer
from train.engine import run
from train.watch.gates import resident_bytes

PARTS = ("overhead", "loader", "soak")
ZERO_STAGES = (0, 2)
TARGET_RATIO = 1.10
FIRST_STEPS = 3
"""Of each run, not counted: allocations, and DeepSpeed's first buffers."""
WORKERS = (0, 1, 2)
LOSSES_AGREE = 1e-4
"""Largest relative difference of the two loops' losses."""
SETTLING = 0.25
"""Share of the soak that its slopes leave out."""
FLAT_GROWTH = 0.02
"""Of the resident size, over the whole soak."""
SMALL_PHOTOGRAPHS = (("chelsea.png", 112), ("rocket.jpg", 160))


def step_seconds(log: Path) -> list[float]:
    """Of every step but the first, from the times in a stage's log.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ends = [line["seconds"] for line in lines if "loss" in line]
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def measure_overhead(
    *, options: dict[str, dict[str, Any]], steps: int, repeats: int, zero_stage: int
) -> dict[str, Any]:
    """RuntimeError if the two loops do not train alike."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, deepspeed, compute, by_turn = [], [], [], []
    difference = 0.0
    with tempfile.TemporaryDirectory() as name:
        dataset = write_conversations(Path(name), [p for p in PHOTOGRAPHS if p[1] <= 800])
        for repeat in range(repeats):
            losses = {}
            for loop in ("plain", "deepspeed") if repeat % 2 else ("deepspeed", "plain"):
                config = stage_config(Path(name) / str(repeat), steps, zero_stage=zero_stage)
                model = build_model(options)
                parameters = sum(p.numel() for p in model.parameters())
                if loop == "plain":
                    times = train_plainly(config, model, step_reader(config, model, dataset), device)
                    losses[loop] = times.losses
                    plain += times.seconds[FIRST_STEPS:]
                    pairs = zip(times.seconds, times.read_seconds, strict=True)
                    compute += [whole - read for whole, read in pairs][FIRST_STEPS:]
                else:
                    result = run(config, dataset=dataset, tokenizer=build_tokenizer(), model=model)
                    losses[loop] = result.losses
                    deepspeed += step_seconds(result.output_dir / "log.jsonl")[FIRST_STEPS - 1 :]
                del model
            pairs = zip(losses["plain"], losses["deepspeed"], strict=True)
            difference = max([difference, *(abs(a - b) / abs(a) for a, b in pairs)])
            if difference > LOSSES_AGREE:
                raise RuntimeError(
                    f"losses of the two loops must agree within {LOSSES_AGREE}, got {difference}"
                )
            counted = steps - FIRST_STEPS
            medians = [statistics.median(seconds[-counted:]) for seconds in (deepspeed, plain)]
            by_turn.append(medians[0] / medians[1])
            turn = f"ZeRO {zero_stage}, turn {repeat + 1} of {repeats}"
            print(f"overhead: {turn}", file=sys.stderr, flush=True)
    ratio = statistics.median(deepspeed) / statistics.median(plain)
    return {
        "parameters": parameters,
        "batch": BATCH,
        "zero_stage": zero_stage,
        "steps_of_each": len(plain),
        "plain_ms": 1e3 * statistics.median(plain),
        "deepspeed_ms": 1e3 * statistics.median(deepspeed),
        "ratio": ratio,
        "ratio_by_turn": by_turn,
        "ratio_of_shortest": min(deepspeed) / min(plain),
        "target": TARGET_RATIO if zero_stage == 0 else None,
        "within_target": ratio <= TARGET_RATIO if zero_stage == 0 else None,
        "largest_loss_difference": difference,
        "demand_samples_per_s": BATCH / statistics.median(compute),
    }


def measure_loader(
    *, photographs: Sequence[tuple[str, int]], steps: int, repeats: int, paper_window: int = 448
) -> list[dict[str, Any]]:
    """A row for each number of windows and of workers: medians over the repeats, which take turns."""
    model, rows = build_model(TINY), []
    with tempfile.TemporaryDirectory() as name:
        dataset = write_conversations(Path(name), photographs)
        for window in (STEP_WINDOW, paper_window):
            mode = "single" if window == STEP_WINDOW else "dynamic"
            config = stage_config(Path(name), steps, zero_stage=0, window=window, mode=mode)
            reader = step_reader(config, model, dataset)
            reader(0)  # imports and the page cache
            rates: dict[int, list[float]] = {workers: [] for workers in WORKERS}
            images = windows = 0
            for _ in range(repeats):
                for workers in WORKERS:
                    images = windows = 0
                    start = time.perf_counter()
                    for data in prefetched(reader, range(steps), workers):
                        for batch in data.micro_batches:
                            images += int(batch["images_per_sample"].sum())
                            windows += int(batch["windows_per_image"].sum())
                    rates[workers].append(steps * BATCH / (time.perf_counter() - start))
            for workers in WORKERS:
                samples_per_s = statistics.median(rates[workers])
                each = 1 / (steps * BATCH)
                rows.append(
                    {
                        "window": window,
                        "windows_per_image": windows / images,
                        "workers": workers,
                        "samples_per_s": samples_per_s,
                        "images_per_s": samples_per_s * images * each,
                        "windows_per_s": samples_per_s * windows * each,
                    }
                )
            print(f"loader: windows of {window}", file=sys.stderr, flush=True)
    return rows


@dataclasses.dataclass(slots=True)
class SampledDataset:
    """Reads `dataset` without end, and notes memory and open files whenever it has read `every` samples."""

    dataset: Dataset
    every: int
    noted: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """(samples read, resident bytes, open file handles)."""

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, index: int) -> Sample:
        if index % self.every == 0:
            self.noted.append((index, resident_bytes(), len(os.listdir("/proc/self/fd"))))
        return self.dataset[index % len(self.dataset)]


def measure_soak(steps: int, samples: int = 200) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        dataset = write_conversations(Path(name), SMALL_PHOTOGRAPHS)
        sampled = SampledDataset(dataset, BATCH * max(1, steps // samples))
        config = stage_config(Path(name) / "soak", steps, zero_stage=2, workers=2)
        start = time.perf_counter()
        run(config, dataset=sampled, tokenizer=build_tokenizer(), model=build_model(TINY))
        seconds = time.perf_counter() - start
    return summed_up([(read // BATCH, rss, files) for read, rss, files in sampled.noted], steps, seconds)


def summed_up(noted: list[tuple[int, int, int]], steps: int, seconds: float) -> dict[str, Any]:
    """Slopes and the verdict of `noted` (step, resident bytes, open files), in any order."""
    settled = sorted(noted)[int(SETTLING * len(noted)) :]
    if len(settled) < 3:
        raise ValueError(
            f"--steps must leave at least 3 samples behind the first quarter, got {len(settled)}"
        )
    at = [float(step) for step, _, _ in settled]
    memory = statistics.linear_regression(at, [float(rss) for _, rss, _ in settled]).slope
    files = [count for _, _, count in settled]
    end_bytes = settled[-1][1]
    return {
        "steps": steps,
        "seconds": seconds,
        "samples": len(noted),
        "start_mb": sorted(noted)[0][1] / 1e6,
        "settled_mb": settled[0][1] / 1e6,
        "end_mb": end_bytes / 1e6,
        "slope_bytes_per_step": memory,
        "growth": memory * steps / end_bytes,
        "file_handles": [min(files), max(files)],
        "file_handles_slope": statistics.linear_regression(at, [float(count) for count in files]).slope,
        "flat": memory * steps <= FLAT_GROWTH * end_bytes and files[-1] <= files[0],
        "noted": [[step, rss, count] for step, rss, count in sorted(noted)],
    }


def report(options: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = dict(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
        command=f"python -m bench.trainer {shlex.join(options.arguments)}".strip(),
    )
    with contextlib.redirect_stdout(sys.stderr):  # the trainer's own lines
        if "overhead" in options.parts:
            counts = dict(steps=options.overhead_steps, repeats=options.repeats)
            document["overhead"] = [
                measure_overhead(options=MEDIUM, zero_stage=zero_stage, **counts)
                for zero_stage in ZERO_STAGES
            ]
        if "loader" in options.parts:
            document["loader"] = measure_loader(photographs=PHOTOGRAPHS, steps=4, repeats=options.repeats)
        if "soak" in options.parts:
            document["soak"] = measure_soak(options.steps)
    return results.scrub(document)


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| measured | value |", "|---|---|"]
    soak = document.get("soak")
    for overhead in document.get("overhead", ()):
        size = f"{overhead['parameters'] / 1e6:.0f} M parameters, {overhead['batch']} samples"
        target = overhead["target"]
        lines += [
            f"| step of a bare PyTorch loop, {size}, fp32 | {overhead['plain_ms']:.0f} ms |",
            f"| the same on DeepSpeed, ZeRO {overhead['zero_stage']} | {overhead['deepspeed_ms']:.0f} ms |",
            f"| ratio of the two{'' if target is None else f', at most {target:.2f} wanted'} "
            f"| {overhead['ratio']:.3f} |",
            f"| the same in each turn | {' '.join(f'{x:.2f}' for x in overhead['ratio_by_turn'])} |",
            f"| the same of the shortest steps | {overhead['ratio_of_shortest']:.3f} |",
            f"| samples/s that the bare step takes | {overhead['demand_samples_per_s']:.1f} |",
        ]
    for row in document.get("loader", ()):
        where = f"windows of {row['window']} ({row['windows_per_image']:.1f} an image)"
        rates = f"{row['samples_per_s']:.1f} samples/s, {row['images_per_s']:.1f} images/s"
        lines.append(f"| reading JPEG files, {where}, {row['workers']} workers | {rates} |")
    if soak:
        growth = f"{soak['slope_bytes_per_step'] / 1e3:.2f} kB a step at {soak['end_mb']:.0f} MB"
        low, high = soak["file_handles"]
        lines += [
            f"| soak of {soak['steps']:,} steps: growth of memory | {growth} |",
            f"| open file handles in it | {low} to {high} |",
        ]
    return "\n".join(lines) + "\n"


def readme_block(document: dict[str, Any]) -> str:
    where = (
        f"{document['device']}, {document['threads']} threads, torch {document['torch']}, {document['date']}"
    )
    return f"{where}, `{document['command']}`:\n\n{table(document)}"


def save(document: dict[str, Any]) -> None:
    """The document into bench/results/trainer, and a table of it into README.md."""
    from bench.report import README, with_block

    text = with_block(README.read_text(), readme_block(document), "trainer")
    folder = results.RESULTS / "trainer"
    folder.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    (folder / f"{kind}-{document['date']}.json").write_text(json.dumps(document, indent=1) + "\n")
    README.write_text(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--save", action="store_true", help="keep it in bench/results/trainer and README.md")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak (default 2000)")
    parser.add_argument("--overhead-steps", type=int, default=12, help="of each run of a loop (default 12)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of loops and readers (default 5)")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"PART must be one of {', '.join(PARTS)}, got {part!r}")
    minimums = {"steps": 4, "overhead_steps": FIRST_STEPS + 1, "repeats": 1}
    for name, minimum in minimums.items():
        if getattr(options, name) < minimum:
            value = getattr(options, name)
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
    options.parts = options.parts or list(PARTS)
    options.arguments = list(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    document = report(options)
    if options.save:
        save(document)
    print(json.dumps(document, indent=1) if options.json else table(document), end="")


if __name__ == "__main__":
    main()
