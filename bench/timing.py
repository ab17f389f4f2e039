"""Times on a device: events behind a flushed cache on a GPU, the wall clock on the CPU; always medians."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Of the spin before a sample; no GPU runs much faster than 2 GHz, and on a slower one the spin is longer.
CYCLES_PER_US = 2000
MAX_LEAD_US = 5000.0


class Timed(NamedTuple):
    """One thing to time: `run(prepare())`, where only `run` is inside the clock."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Summary(NamedTuple):
    """Median and interquartile range of `repeats` samples, in microseconds."""

    median_us: float
    iqr: float
    repeats: int


def summarize(samples: list[float]) -> Summary:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("samples must not be empty, got []")
    if len(samples) == 1:
        return Summary(samples[0], 0.0, 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, high - low, len(samples))


class CpuClock:
    """Samples by the wall clock; nothing is flushed."""

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def sample(self, timed: Timed) -> float:
        """One duration of `run`, in microseconds."""
        state = timed.prepare()
        start = time.perf_counter()
        timed.run(state)
        return (time.perf_counter() - start) * 1e6


class CudaClock:
    """Samples by CUDA events.

    In front of each sample the GPU spins until the host has enqueued the call, so that a short kernel's time
    is not the host's; then twice the L2 cache is overwritten, so that inputs come from memory. A call that
    takes the host longer than the spin is sampled again behind a longer one, up to MAX_LEAD_US.
    """

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        self._flushed = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._lead_us = 200.0

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Leave nothing of what was there before in the L2 cache."""
        self._flushed.zero_()

    def sample(self, timed: Timed) -> float:
        """One duration of `run`, in microseconds."""
        while True:
            state = timed.prepare()
            torch.cuda._sleep(int(self._lead_us * CYCLES_PER_US))
            self.flush()
            self._start.record()
            enqueued = time.perf_counter()
            timed.run(state)
            host_us = (time.perf_counter() - enqueued) * 1e6
            self._end.record()
            self._end.synchronize()
            if host_us < self._lead_us or self._lead_us == MAX_LEAD_US:
                return self._start.elapsed_time(self._end) * 1e3
            self._lead_us = min(MAX_LEAD_US, 2 * host_us)


def clock_of(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    clock: CpuClock | CudaClock,
    timed: dict[str, Timed],
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 40,
    warm_up: int = 2,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Samples of every entry, taken in turns so that a drift of the machine falls on all alike.

    A round takes one sample of each, starting one place further each time. Rounds go on until `seconds` are
    over or `max_rounds` are done, but there are `min_rounds` at least.

    Returns:
        the samples by name, in microseconds, and the exception of each entry that raised; such an entry has
        no samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in timed}
    raised: dict[str, Exception] = {}

    def take(name: str, action: Callable[[], float | None]) -> None:
        try:
            duration = action()
        except Exception as error:
            # Without its traceback, whose frames would hold the tensors of the call that failed.
            raised[name] = error.with_traceback(None)
            del samples[name]
        else:
            if duration is not None:
                samples[name].append(duration)

    def warm(entry: Timed) -> None:
        for _ in range(warm_up):
            entry.run(entry.prepare())
        clock.synchronize()

    for name, entry in timed.items():
        take(name, functools.partial(warm, entry))
    end = time.monotonic() + seconds
    for rounds in range(max_rounds):
        if rounds >= min_rounds and time.monotonic() > end:
            break
        names = list(samples)
        turn = rounds % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            take(name, functools.partial(clock.sample, timed[name]))
    return samples, raised


def host_times(
    clock: CpuClock | CudaClock, call: Callable[[], Any], repeats: int = 200, burst: int = 20
) -> list[float]:
    """Microseconds from a Python call to its return, while the device keeps up.

    After each `burst` of calls the device is waited for, so that no sample is a wait for a full queue.
    """
    for _ in range(10):
        call()
    durations = []
    for index in range(repeats):
        if index % burst == 0:
            clock.synchronize()
        start = time.perf_counter()
        call()
        durations.append((time.perf_counter() - start) * 1e6)
    clock.synchronize()
    return durations
