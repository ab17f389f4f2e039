"""The tests of a fuzz: thousands of random argument sets, each drawn from a seed and checked by itself."""

import re
from collections.abc import Callable

import pytest


def fuzz_tests(draw: Callable, check: Callable, in_reference: int, in_triton: int) -> tuple[Callable, ...]:
    """test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton.

    draw(seed, backend) is an argument set, check(set) raises unless it ends as it must. A failure prints its
    set. The first two take that many seeds.
    """

    def run(seeds: range, backend: str) -> None:
        for seed in seeds:
            arguments = draw(seed, backend)
            try:
                check(arguments)
            except Exception as error:
                raise AssertionError(f"{arguments}: {type(error).__name__}: {error}") from error

    @pytest.mark.parametrize("seeds", [range(in_reference)], ids=str)
    def test_reference(seeds):
        run(seeds, "reference")

    @pytest.mark.parametrize("seeds", [range(in_triton)], ids=str)
    def test_triton(seeds, interpreter):
        run(seeds, "triton")

    @pytest.mark.long
    @pytest.mark.parametrize("thousand", range(10))
    def test_ten_thousand_in_reference(thousand):
        run(range(1000 * thousand, 1000 * (thousand + 1)), "reference")

    @pytest.mark.long
    @pytest.mark.parametrize("hundred", range(5))
    def test_five_hundred_in_triton(hundred, interpreter):
        run(range(100 * hundred, 100 * (hundred + 1)), "triton")

    return test_reference, test_triton, test_ten_thousand_in_reference, test_five_hundred_in_triton


def assert_refused(call: Callable[[], object], named: tuple[str, ...] | list[str]) -> None:
    """The call must raise an error that begins with one of these arguments, or of these patterns."""
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        assert re.match(rf"({'|'.join(named)}) must ", str(error)), f"another argument is named: {error}"
    else:
        raise AssertionError("no error was raised")
