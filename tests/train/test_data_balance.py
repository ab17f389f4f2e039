"""Balance: every sample once whoever reads it, forwards of even size, and a stop when too many are bad."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import IGNORE_INDEX, ImageProcessor
from train.batch import RowEncoder, StepReader
from train.config import DataConfig
from train.data import BadSample, Sample, SkipLimit, balance

from .tiny_stage import tiny_model


class Views:
    """Sample i has a picture of a size drawn from i, or none, or cannot be read; it answers with i words."""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return 500

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        rng = random.Random(index)
        return [(28 * rng.randint(1, 3), 28 * rng.randint(1, 3)) for _ in range(rng.choice([0, 1, 1, 1, 2]))]

    def __getitem__(self, index: int) -> Sample:
        self.decoded.append(index)
        if index % 50 == 7:
            raise BadSample("seventh", f"sample {index}")
        images = [np.full((*size, 3), 90, np.uint8) for size in self.image_sizes(index)]
        return Sample(images, [("<image>" * len(images) + "which ?", "red " * (1 + index % 7))])


def reader_of(tokenizer, rank=0, world_size=1, micro=4, size=24, mode="dynamic", dataset=None, **data):
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(window_size=28, mode=mode),
        prompt="plain",
        sequence_length=64,
        image_token_id=2,
        end_token_id=3,
    )
    config = DataConfig(prompt="plain", on_bad_sample="skip", **data)
    sizes = dict(global_batch_size=size, micro_batch_size=micro, pad_token_id=0)
    dataset = Views() if dataset is None else dataset
    return StepReader(dataset, encoder, config, seed=3, rank=rank, world_size=world_size, **sizes)


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 6),
    shares=st.integers(1, 12),
    data=st.data(),
)
def test_a_deal_is_a_partition_and_beats_consecutive_shares(size, shares, data):
    length = st.lists(st.integers(0, 10), min_size=size * shares, max_size=size * shares)
    costs = data.draw(length)
    dealt = balance.deal(costs, shares)
    assert [len(share) for share in dealt] == [size] * shares
    assert sorted(place for share in dealt for place in share) == list(range(size * shares))
    assert all(share == sorted(share) for share in dealt) and dealt == balance.deal(costs, shares)
    consecutive = [list(range(i * size, (i + 1) * size)) for i in range(shares)]
    if len(set(costs)) == 1:
        assert dealt == consecutive
    assert balance.imbalance(costs, dealt) <= balance.imbalance(costs, consecutive)


def test_balance_beats_consecutive_shares_on_random_batches():
    rng = random.Random(0)
    better, gains = 0, []
    for _ in range(200):
        costs = [rng.choice([0, 1, 3, 5, 7, 10]) for _ in range(64)]
        consecutive = [list(range(i, i + 4)) for i in range(0, 64, 4)]
        before = balance.imbalance(costs, consecutive)
        after = balance.imbalance(costs, balance.deal(costs, 16))
        assert 1 <= after <= before
        better += after < before
        gains.append((before, after))
    before, after = np.mean(gains, axis=0)
    assert better >= 195 and before > 1.5 and after < 1.1


@settings(max_examples=25, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    accumulation=st.sampled_from([1, 2, 3]),
    micro=st.integers(1, 3),
    step=st.integers(0, 60),
    mode=st.sampled_from(["single", "dynamic"]),
)
def test_every_sample_is_read_once_by_one_rank(tokenizer, world_size, accumulation, micro, step, mode):
    size = world_size * accumulation * micro
    one = reader_of(tokenizer, micro=size, size=size, mode=mode, balance="none")
    whole = one(step)
    read, forwards, steps = [], [], []
    for rank in range(world_size):
        reader = reader_of(tokenizer, rank, world_size, micro, size, mode)
        steps.append(reader(step))
        read += reader.dataset.decoded
        forwards += [int(batch["windows_per_image"].sum()) for batch in steps[-1].micro_batches]
        assert len(steps[-1].micro_batches) == accumulation
    assert sorted(read) == sorted(one.dataset.decoded)
    for count in ("num_samples", "num_answer_tokens", "num_images", "num_windows", "num_tokens"):
        assert sum(getattr(data, count) for data in steps) == getattr(whole, count), count
    assert sorted(entry for data in steps for entry in data.skipped) == sorted(whole.skipped)
    assert len({(data.plan_checksum, data.imbalance) for data in steps}) == 1
    if not whole.skipped and sum(forwards):  # what the headers say is what the forwards hold
        assert steps[0].imbalance == pytest.approx(max(forwards) / np.mean(forwards))


def test_forwards_are_more_even_than_without(tokenizer):
    balanced = [reader_of(tokenizer)(step).imbalance for step in range(8)]
    unbalanced = []
    for step in range(8):
        batches = reader_of(tokenizer, balance="none")(step).micro_batches
        windows = [int(batch["windows_per_image"].sum()) for batch in batches]
        unbalanced.append(max(windows) / np.mean(windows))
    assert np.mean(balanced) < 1.1 < 1.3 < np.mean(unbalanced)
    assert reader_of(tokenizer, balance="none")(0).imbalance is None


def test_plan_checksum_tells_ranks_with_other_data_apart(tokenizer):
    class Moved(Views):
        def image_sizes(self, index: int) -> list[tuple[int, int]]:
            return super().image_sizes(index + 1)

    assert reader_of(tokenizer)(0).plan_checksum != reader_of(tokenizer, dataset=Moved())(0).plan_checksum
    assert (
        balance.checksum([[1, 2], [3]]) == balance.checksum([[1, 2], [3]]) != balance.checksum([[1, 3], [2]])
    )
    assert balance.checksum([[1 << 70]]) != balance.checksum([[0]])


def test_loss_does_not_depend_on_the_balance(tokenizer):
    """The sum of the loss over the forwards is that of one whole batch."""
    model = tiny_model()
    model.set_window_size(28)

    def loss(**options: object) -> float:
        data = reader_of(tokenizer, size=12, **options)(1)
        with torch.no_grad():
            return sum(
                float(model(**batch).loss_sum)
                for batch in data.micro_batches
                if (batch["labels"] != IGNORE_INDEX).any()
            )

    expected = loss(micro=12, balance="none")
    assert loss(micro=2) == pytest.approx(expected, rel=1e-4)
    assert loss(micro=3) == pytest.approx(expected, rel=1e-4)


def test_an_error_in_the_probe_names_the_dataset(tokenizer):
    class Broken(Views):
        def image_sizes(self, index: int) -> list[tuple[int, int]]:
            raise OSError("gone")

    with pytest.raises(ValueError, match="dataset Broken must give sample [0-9]+, got OSError: gone"):
        reader_of(tokenizer, dataset=Broken())(0)


def test_skip_limit():
    limit = SkipLimit(0.1)
    limit.add([("bad_json", f"line {i}") for i in range(30)], 30)  # too few to judge
    state = json.loads(json.dumps(limit.state_dict()))
    again = SkipLimit(0.1)
    again.load_state_dict(state)
    assert again.state_dict() == state and len(state["messages"]) == 20
    again.add([("missing_image", "line 99")] * 2, 300)  # 32 of 362: within
    assert again.share == pytest.approx(32 / 362)
    with pytest.raises(ValueError) as error:
        limit.add([("missing_image", "line 99")] * 2, 40)
    message = str(error.value)
    assert "data.max_skipped_share 0.1" in message and "32 of 102 (bad_json 30, missing_image 2)" in message
    assert "missing_image: line 99" in message and "line 12" in message and "line 10" not in message
    SkipLimit(1.0).add([("bad_json", "")] * 500, 0)
    with pytest.raises(ValueError, match="got 1 of 100"):
        SkipLimit(0.0).add([("bad_json", "")], 99)
