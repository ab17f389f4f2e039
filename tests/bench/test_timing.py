"""The timing helper: what is inside the clock, turns, failures, host times."""

import time
from types import SimpleNamespace

import pytest
import torch

from bench import timing


def test_summary_is_median_and_interquartile_range():
    assert timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 5)
    assert timing.summarize([7.0]) == (7.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"samples must not be empty, got \[\]"):
        timing.summarize([])


def test_only_run_is_inside_the_clock():
    timed = timing.Timed(lambda: time.sleep(0.05), lambda _: time.sleep(0.002))
    assert 2_000 <= timing.CpuClock().sample(timed) < 40_000


class CountingClock(timing.CpuClock):
    def __init__(self):
        self.synchronized = 0

    def synchronize(self) -> None:
        self.synchronized += 1


def recording(names: str, log: list[str]) -> dict[str, timing.Timed]:
    return {name: timing.Timed(lambda: None, lambda _, name=name: log.append(name)) for name in names}


def test_entries_take_turns_and_each_round_starts_one_further():
    log: list[str] = []
    samples, raised = timing.interleave(
        timing.CpuClock(), recording("abc", log), seconds=0.0, min_rounds=3, warm_up=2
    )
    assert "".join(log) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(durations) for name, durations in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert not raised


def test_rounds_end_with_the_time_or_their_number():
    slow = {"slow": timing.Timed(lambda: None, lambda _: time.sleep(0.02))}
    samples, _ = timing.interleave(timing.CpuClock(), slow, seconds=0.1, min_rounds=2, max_rounds=50)
    assert 2 <= len(samples["slow"]) <= 7
    samples, _ = timing.interleave(timing.CpuClock(), recording("a", []), seconds=60.0, max_rounds=4)
    assert len(samples["a"]) == 4


def test_a_failure_in_the_middle_costs_only_its_own_samples():
    calls = iter(range(100))

    def fails_later(_):
        if next(calls) == 4:
            raise RuntimeError("out of luck")

    log: list[str] = []
    timed = {"bad": timing.Timed(lambda: None, fails_later), **recording("a", log)}
    samples, raised = timing.interleave(timing.CpuClock(), timed, seconds=0.0, min_rounds=5)
    assert list(samples) == ["a"] and len(samples["a"]) == 5
    assert str(raised["bad"]) == "out of luck"


def test_host_times_wait_for_the_device_between_bursts():
    clock = CountingClock()
    assert len(timing.host_times(clock, lambda: None, repeats=50, burst=10)) == 50
    assert clock.synchronized == 5 + 1


class FakeEvent:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 0.25


@pytest.fixture
def fake_cuda(monkeypatch):
    """A GPU of 1 KiB of L2 on which every sample takes 250 us; the list of spins it was told to make."""
    spins: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1024)
    )
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    return spins


def test_a_call_slower_than_the_spin_is_sampled_again_behind_a_longer_one(fake_cuda):
    clock = timing.CudaClock(torch.device("cpu"))
    assert clock.sample(timing.Timed(lambda: None, lambda _: None)) == 250.0
    assert fake_cuda == [200 * timing.CYCLES_PER_US]
    assert clock.sample(timing.Timed(lambda: None, lambda _: time.sleep(0.001))) == 250.0
    first, second, *_ = fake_cuda[1:]
    assert first == 200 * timing.CYCLES_PER_US and second >= 2000 * timing.CYCLES_PER_US
    clock.sample(timing.Timed(lambda: None, lambda _: time.sleep(0.02)))
    assert fake_cuda[-1] == timing.MAX_LEAD_US * timing.CYCLES_PER_US


def test_the_cache_is_flushed_before_each_sample(fake_cuda):
    clock = timing.CudaClock(torch.device("cpu"))
    assert clock._flushed.numel() == 2048

    def dirty(_):
        assert not clock._flushed.any()
        clock._flushed.fill_(1)

    for _ in range(3):
        clock.sample(timing.Timed(lambda: clock._flushed.fill_(1), dirty))


@pytest.mark.gpu
def test_a_short_kernel_is_not_timed_as_its_launch():
    """Without the spin in front, events around a chain of small kernels show the host, not the GPU."""
    clock = timing.clock_of(torch.device("cuda"))
    x = torch.randn(64, device="cuda")

    def chain(_):
        y = x
        for _ in range(100):
            y = y * 1.01
        return y

    timed = timing.Timed(lambda: None, chain)
    chain(None)
    host = min(timing.host_times(clock, lambda: chain(None), repeats=20, burst=1))
    assert min(clock.sample(timed) for _ in range(5)) < host


@pytest.mark.gpu
def test_a_sample_grows_with_the_work():
    clock = timing.clock_of(torch.device("cuda"))
    durations = []
    for size in (512, 4096):
        x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        timed = timing.Timed(lambda: None, lambda _, x=x: x @ x)
        timed.run(None)
        durations.append(sorted(clock.sample(timed) for _ in range(5))[2])
    assert durations[1] > 4 * durations[0]
