"""Logs of a run that never was, through the writer of real ones: four stages, resumes, skipped steps."""

import json
import math
import random
from pathlib import Path

from train.config import TrainConfig
from train.watch import Progress, StepRecord, Summary

LAYERS = (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)
STAGES = {  # steps, loss at the start and the end, learning rate, samples a step, tokens/s, MFU
    "PT": (600, 4.6, 2.3, 1e-4, 128, 4_100, 0.36),
    "CPT": (400, 2.5, 1.7, 1e-5, 32, 7_800, 0.41),
    "DRA": (400, 1.8, 1.45, 1e-5, 32, 3_300, 0.44),
    "IFT": (550, 1.5, 1.05, 5e-6, 16, 14_000, 0.39),
}
BAD_STEPS = {("PT", 231): "spike", ("PT", 402): "nonfinite", ("IFT", 120): "spike"}
RESUMES = {"PT": (301,), "DRA": (101, 251)}
SKIPPED_EVERY = 7


def write_run(folder: Path, scale: float = 1.0, seed: int = 0) -> None:
    """One output folder a stage in `folder`; `scale` multiplies their lengths."""
    before, opened = None, 0.0
    for name in STAGES:
        opened = write_stage(folder / name, name, init_from=before, scale=scale, seed=seed, opened=opened)
        before = folder / name


def write_stage(
    folder: Path,
    name: str,
    *,
    init_from: Path | None = None,
    scale: float = 1.0,
    seed: int = 0,
    opened: float = 0.0,
) -> float:
    """Writes a stage's config and log; its gates start `opened` and the result is where they end."""
    steps, first, last, peak, batch, rate, mfu = STAGES[name]
    steps = max(4, round(steps * scale))
    draw = random.Random(f"{seed} {name}")
    folder.mkdir(parents=True)
    config = TrainConfig(stage=name, trainable=("gated_cross_attention",))
    config.schedule.steps = steps
    values = config.to_dict() | {"init_from": None if init_from is None else str(init_from)}
    (folder / "config.json").write_text(json.dumps(values))
    borders = [0, *(round(step * scale) for step in RESUMES.get(name, ())), steps]
    bad = {round(step * scale): kind for (stage, step), kind in BAD_STEPS.items() if stage == name}
    skipped = {"missing_image": 0, "unreadable_image": 0, "empty_answer": 0}
    now = [0.0]
    for start, stop in zip(borders, borders[1:], strict=False):
        resumed = dict(resume_step=start or None, clock=lambda: now[0])
        with Progress(config, folder, enabled=True, **resumed) as progress:
            for step in range(start + 1, stop + 1):
                share, kind = step / steps, bad.get(step)
                if step % SKIPPED_EVERY == 0:
                    skipped[draw.choice([*skipped, "missing_image"])] += 1
                loss = last + (first - last) * math.exp(-5 * share) + draw.gauss(0, 0.09) * math.sqrt(last)
                opening = opened + 0.09 * share
                seconds = batch * 28 / rate * draw.uniform(0.93, 1.12)
                now[0] += seconds
                progress.step(
                    StepRecord(
                        step=step,
                        loss={"spike": 3 * loss, "nonfinite": math.nan}.get(kind, loss),
                        lr=peak * min(1.0, 20 * share) * (0.55 + 0.45 * math.cos(math.pi * share)),
                        grad_norm=math.inf
                        if kind == "nonfinite"
                        else draw.lognormvariate(-0.5 - share, 0.25) * (30 if kind else 1),
                        num_answer_tokens=20 * batch,
                        samples_seen=step * batch,
                        num_skipped=int(step % SKIPPED_EVERY == 0),
                        num_truncated=0,
                        step_seconds=seconds,
                        images=batch,
                        windows=batch * 5,
                        tokens=batch * 28,
                        mfu=mfu * batch * 28 / rate / seconds,
                        memory_bytes=61 * 10**9,
                        imbalance=draw.uniform(1.0, 1.2),
                        gates={
                            layer: (opening * (1 - layer / 60), opening * (0.3 + layer / 50))
                            for layer in LAYERS
                        }
                        if step % 10 == 0
                        else None,
                        skipped_step=kind,
                    )
                )
            if stop == steps:
                progress.finish(Summary(samples_seen=steps * batch, skipped=skipped))
    return opened + 0.09
