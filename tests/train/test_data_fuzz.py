"""Whatever the records are: every one is trained on or skipped by a reason, and nothing else is raised."""

import pytest

from .fuzz_data import WRITERS, fuzz


def check(result: dict, num_samples: int) -> None:
    assert result["fuzzed_samples"] >= num_samples and result["lost_silently"] == 0
    assert result["trained"] + sum(result["skipped"].values()) == result["fuzzed_samples"]
    assert set(result["by_reader"]) == set(WRITERS)
    # the fuzzing itself reaches both sides, and many ways to be bad
    assert 0.2 < result["trained"] / result["fuzzed_samples"] < 0.8


def test_three_hundred_samples():
    check(fuzz(300, seed=1), 300)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_thousand_samples():
    result = fuzz(10_000, seed=2)
    check(result, 10_000)
    expected = """
        bad_json bad_record bad_conversation bad_box bad_text missing_image missing_text unreadable_image
        unreadable_text image_marks empty_question empty_answer empty_caption no_image no_answer_left
        no_annotation reserved_token duplicate_file small_image
    """
    assert set(expected.split()) <= set(result["skipped"])
