"""Steps that would harm the model change nothing, are counted, and stop the run when they are many."""

import math

import pytest
import torch

from model import InfiMMHD
from train.config import GuardConfig
from train.engine import run
from train.guard import StepGuard

from .tiny_stage import log_of, tiny_model


class Counting(torch.optim.SGD):
    """One weight that falls by 1 a step."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.weight.grad = torch.ones(())
        super().__init__([self.weight], lr=1.0)


def take(guard: StepGuard, optimizer: Counting, loss: float, *, groups: int = 1) -> tuple[float, str | None]:
    guard.begin(loss)
    for _ in range(groups):
        optimizer.step()
    return guard.end(overflow=False, finds_scale=False)


def test_a_good_step_is_taken_in_every_group():
    optimizer = Counting()
    guard = StepGuard(GuardConfig(), optimizer, lambda: 2.5)
    assert take(guard, optimizer, 1.0, groups=3) == (2.5, None)
    assert optimizer.weight == -3


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_what_is_no_number_moves_nothing(loss, norm):
    optimizer = Counting()
    guard = StepGuard(GuardConfig(), optimizer, lambda: norm)
    assert take(guard, optimizer, loss, groups=2)[1] == "nonfinite"
    assert optimizer.weight == 0 and guard.skipped == {"nonfinite": 1}


@pytest.mark.parametrize(("loss", "norm"), [(9.0, 1.0), (1.0, 9.0)])
def test_a_spike_moves_nothing_and_is_no_measure_for_the_next(loss, norm):
    norms = []
    optimizer = Counting()
    guard = StepGuard(GuardConfig(spike_sigmas=4.0, window=4), optimizer, lambda: norms[-1])
    for i in range(4):
        norms.append(1 + 0.1 * i)
        assert take(guard, optimizer, 1 + 0.1 * i)[1] is None
    for _ in range(2):
        norms.append(norm)
        assert take(guard, optimizer, loss)[1] == "spike"
    norms.append(1.2)
    assert take(guard, optimizer, 1.2)[1] is None
    assert optimizer.weight == -5
    # no spike is seen before there is a window to compare with
    assert StepGuard(GuardConfig(spike_sigmas=4.0, window=4), Counting(), lambda: 1e9)._is_spike() is False


def test_state_goes_on():
    config = GuardConfig(spike_sigmas=4.0, window=3)
    guards = []
    for _ in range(2):
        optimizer = Counting()
        guards.append((StepGuard(config, optimizer, lambda: 1.0), optimizer))
    (first, optimizer), (second, other) = guards
    for loss in (1.0, 1.1, math.nan, 1.2):
        take(first, optimizer, loss)
    second.load_state_dict(first.state_dict())
    assert second.skipped == {"nonfinite": 1}
    assert take(second, other, 5.0)[1] == "spike"


def test_too_many_stop_the_run():
    optimizer = Counting()
    guard = StepGuard(GuardConfig(max_skipped_steps=2), optimizer, lambda: 1.0)
    for _ in range(2):
        take(guard, optimizer, math.nan)
    with pytest.raises(FloatingPointError, match=r"at most guard.max_skipped_steps 2, got 3 \(nonfinite 3\)"):
        take(guard, optimizer, math.nan)


def test_overflows_of_fp16_are_no_harm():
    guard = StepGuard(GuardConfig(max_skipped_steps=0), Counting(), lambda: 1.0)
    guard.begin(1.0)
    assert guard.end(overflow=True, finds_scale=True) == (math.inf, "overflow")
    assert guard.skipped == {"overflow": 1}


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")],
)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_leaves_every_bit_as_it_was(
    tiny, colours, tokenizer, monkeypatch, zero_stage, precision, what
):
    """Step 2 of 4 is poisoned: the weights after it are those before it, and the run goes on. It was the end
    of the run."""
    forward, calls, seen = InfiMMHD.forward, [0], []

    def poisoned(model: InfiMMHD, *args: object, **inputs: object) -> object:
        calls[0] += 1
        out = forward(model, *args, **inputs)
        seen.append(round(float(out.loss_sum), 4))
        if calls[0] == 2:
            factor = math.nan if what == "loss" else math.inf
            if what == "loss":
                out.loss, out.loss_sum = out.loss * factor, out.loss_sum * factor
            else:
                out.loss.register_hook(lambda gradient: gradient * factor)
        return out

    class Same:
        """One sample again and again, so that losses show the weights."""

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> object:
            return colours[0]

    monkeypatch.setattr(InfiMMHD, "forward", poisoned)
    config = tiny(
        "IFT",
        schedule__steps=4,
        schedule__warmup_steps=0,
        parallel__zero_stage=zero_stage,
        parallel__precision=precision,
    )
    result = run(config, dataset=Same(), tokenizer=tokenizer, model=tiny_model())
    assert seen[0] != seen[1] == seen[2] != seen[3]
    lines = [line for line in log_of(result.output_dir) if "loss" in line]
    assert [line["skipped_step"] for line in lines] == [None, "nonfinite", None, None]
    assert result.samples_seen == 24 and result.skipped == {"nonfinite_step": 8}
    assert [math.isfinite(norm) for norm in result.grad_norms] == [True, False, True, True]
