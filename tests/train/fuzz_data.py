"""Random good and broken records for every reader: samples in = trained + skipped by reason.

`fuzz(num_samples, seed)` needs no pytest; `python -m tests.train.fuzz_data NUMBER SEED` prints its result."""

import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from model import ImageProcessor
from train.batch import RowEncoder, StepReader, prefetched
from train.config import DataConfig
from train.data import build_dataset

from .fuzz_records import EITHER, GOOD, WRITERS, Case
from .tiny_stage import WORDS, word_tokenizer

_SEQUENCE_LENGTH = 48


def fuzz(num_samples: int, seed: int) -> dict[str, Any]:
    """At least `num_samples` records through every reader, `StepReader` and threads: {"fuzzed_samples",
    "trained", "skipped": {reason: n}, "lost_silently", "by_reader"}. AssertionError, naming reader and seed,
    when a good record was skipped or a broken one trained on; every other exception is the finding itself."""
    rng = random.Random(seed)
    totals: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    by_reader: Counter[str] = Counter()
    encoder_tokenizer = word_tokenizer()
    while totals["in"] < num_samples:
        for name, write in WRITERS.items():
            round_seed = rng.getrandbits(32)
            with tempfile.TemporaryDirectory() as folder:
                case = Case(Path(folder), random.Random(round_seed))
                config, expected = write(case)
                trained, reasons = _read(config, case.rng, encoder_tokenizer, len(expected))
            counts = Counter(expected)
            where = f"{name}, seed {round_seed}: {counts} became {trained} trained and {reasons}"
            assert counts[GOOD] <= trained <= counts[GOOD] + counts[EITHER], where
            totals["in"] += len(expected)
            totals["trained"] += trained
            skipped += reasons
            by_reader[name] += len(expected)
    return {
        "fuzzed_samples": totals["in"],
        "trained": totals["trained"],
        "skipped": dict(skipped.most_common()),
        "lost_silently": totals["in"] - totals["trained"] - skipped.total(),
        "by_reader": dict(by_reader),
    }


def _read(
    config: dict[str, Any], rng: random.Random, tokenizer: Any, length: int
) -> tuple[int, Counter[str]]:
    """Every sample of the dataset once, as ranks and accumulation steps read it: trained, skipped."""
    data = DataConfig(
        on_bad_sample="skip",
        sequence_length=_SEQUENCE_LENGTH,
        balance=rng.choice(["windows", "windows", "none"]),
        prompt="plain",
        **config,
    )
    dataset = build_dataset(data)
    assert len(dataset) == length, f"{config}: {length} records became {len(dataset)}"
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(window_size=28, mode=rng.choice(["single", "dynamic"])),
        prompt="plain",
        sequence_length=_SEQUENCE_LENGTH,
        image_token_id=WORDS.index("<image>"),
        end_token_id=WORDS.index("<end>"),
    )
    steps = next(n for n in (3, 2, 1) if length % n == 0)
    size = length // steps
    world_size = next(n for n in rng.sample([1, 2, 3, 4], 4) if size % n == 0)
    share = size // world_size
    micro = next(n for n in rng.sample([1, 2, 3, share], 4) if share % n == 0)
    trained, reasons, checksums = 0, Counter(), set()
    sizes = dict(global_batch_size=size, micro_batch_size=micro, pad_token_id=0, world_size=world_size)
    seed, workers = rng.getrandbits(60), rng.choice([0, 2])
    for rank in range(world_size):
        reader = StepReader(dataset, encoder, data, seed=seed, rank=rank, **sizes)
        for number, step in enumerate(prefetched(reader, range(steps), workers)):
            trained += step.num_samples
            reasons += step.skipped_by_reason
            checksums.add((number, step.plan_checksum))
            assert all(reason and ": " in message for reason, message in step.skipped), step.skipped
            assert step.num_images == sum(int(b["images_per_sample"].sum()) for b in step.micro_batches)
            assert step.num_windows == sum(len(b.get("pixel_values", ())) for b in step.micro_batches)
    assert len(checksums) == steps, "ranks disagree on who reads what"
    return trained, reasons


if __name__ == "__main__":
    number, seed = (*map(int, sys.argv[1:]), *(300, 0)[len(sys.argv) - 1 :])
    print(json.dumps(fuzz(number, seed), indent=2))
