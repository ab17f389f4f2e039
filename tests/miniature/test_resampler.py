"""The warm-up of the resamplers: what it names, and that arms start from it."""

import dataclasses

import pytest
import torch

from bench.miniature.arms import RESAMPLERS, build
from bench.miniature.features import SeenPages
from bench.miniature.pages import Word
from bench.miniature.resampler import NamedPages, named, warm_up_resampler
from bench.miniature.storage import load_tensors

from .conftest import CPU, TINY


def test_words_are_named_by_place():
    found = named([Word("07", 2, 12, 1), Word("95", 0, 12, 3)])
    assert found.tolist() == [[0, 0, 0], [3, 1, 8], [0, 0, 0], [1, 10, 6]]


def test_pages_come_with_their_own_words(warm):
    pages = SeenPages(warm, "single", "train")
    data = NamedPages(pages, 0)
    drawn = set()
    for i in range(20):
        features, words = data[i]
        page = next(n for n in range(len(pages)) if torch.equal(pages.visual([n], CPU)[0, 0], features))
        assert words.equal(named(pages.words[page]))
        drawn.add(page)
    assert len(drawn) > 3
    assert torch.equal(data[3][0], NamedPages(pages, 0)[3][0])


@pytest.mark.parametrize(("arm", "part"), RESAMPLERS.items())
def test_arms_start_from_it(warm, arm, part):
    """From a new resampler no arm learned to read, however it was trained."""
    kept = load_tensors(warm / "warm_up" / f"{part}.pt")["part"]
    model = build(TINY, arm, warm / "warm_up", 0)
    assert all(torch.equal(value, kept[name]) for name, value in model.connector.state_dict().items())
    assert any(p.requires_grad for p in model.connector.parameters()), "it is trained on with the arm"


def test_it_learns(warm, tmp_path):
    (tmp_path / "features").symlink_to(warm / "features")
    settings = dataclasses.replace(TINY.resampler, steps=60, batch=8, lr=5e-3)
    warm_up_resampler(dataclasses.replace(TINY, resampler=settings), tmp_path, CPU, "448-resampler")
    losses = load_tensors(tmp_path / "warm_up" / "resampler.pt")["loss"]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
