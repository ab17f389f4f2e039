"""The shared warm-up: what it is taught, and that it survives being ended."""

import dataclasses
import re

import pytest
import torch

from bench.miniature import warmup
from bench.miniature.pages import Word, questions, tokenizer
from bench.miniature.storage import load_tensors
from bench.miniature.warmup import FullPages, ToldTexts, cells_of, cut, encoded
from model.infimm_hd import IGNORE_INDEX
from train.data.painting import COLOUR_NAMES

from .conftest import CPU, TINY


def test_pages_are_taught_at_every_scale():
    plain, low = FullPages(TINY, 0, low=False), FullPages(TINY, 0, low=True)
    for data, factors in ((plain, (1, 2, 1)), (low, (2, 4))):
        for index, factor in enumerate(factors):
            pixels, shown = data[index]
            assert pixels.shape == shown.shape == (3, TINY.page, TINY.page)
            assert shown[0].max() <= 10 and shown[2].max() == 2
            digits = (shown[0] > 0).float().mean().item()
            assert 0.02 < digits < 0.7, factor
            assert (shown[1] > 0).equal(shown[0] > 0)
    assert plain[1][0].mean().abs() < 3, "pixels are normalised"


def test_cells_are_named_by_their_centre():
    shown = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    shown[0, 0, 4, 12] = 7
    assert cells_of(shown, 8)[0, 0].tolist() == [[0, 7], [0, 0]]
    tiles = cut(torch.arange(16).view(1, 1, 4, 4), 2)
    assert tiles[1, 0].tolist() == [[2, 3], [6, 7]]


def test_labels_stand_on_answers_alone():
    words = [Word("12", 0, 12, 0), Word("34", 1, 12, 3)]
    asked = [q for q in questions(words) if q.kind in ("place", "count")]
    tokens = tokenizer()
    ids, labels = encoded(tokens, [("<image>", asked[:1]), ("<image>", asked[1:])])
    assert len(ids) == len(labels) and ids.count(2) == 2
    answered = [i for i in labels if i != IGNORE_INDEX]
    assert tokens.decode(answered) == " ".join(f"{q.answer} <|endofchunk|>" for q in asked)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))


def test_told_texts_hold_what_is_asked_for():
    tokens, told, marked = tokenizer(), 0, 0
    for ids, labels in (ToldTexts(TINY, 0)[i] for i in range(100)):
        text = tokens.decode(ids)
        told += " . " in text
        marked += "<image>" in text
        assert any(label != IGNORE_INDEX for label in labels)
    assert 65 < told < 95 and 35 < marked < 65


def test_the_first_texts_are_read_by_colour_alone():
    """With all kinds from the start the LLM copied one of the told words, whichever was asked for, for as
    long as it was trained."""
    size = dataclasses.replace(TINY, language_reads_first=10)  # of two texts a step
    tokens = tokenizer()
    texts = [tokens.decode(ToldTexts(size, 0)[i][0]) for i in range(60)]
    early, late = texts[:20], texts[20:]
    assert all(" . " in text for text in early) and not all(" . " in text for text in late)
    named = "|".join(COLOUR_NAMES)
    for text in early:
        asked = re.findall(r"what .*? <\|endofchunk\|>", text)
        assert len(asked) >= 2
        assert all(re.fullmatch(rf"what is ({named}) \d \d <\|endofchunk\|>", turn) for turn in asked)
    assert any("how many" in text for text in late)


class Ended(Exception):
    pass


@pytest.mark.parametrize("part", ["language", "vision"])
def test_an_ended_warm_up_goes_on_where_it_stood(tmp_path, monkeypatch, part):
    monkeypatch.setattr(warmup, "KEEP_EVERY", 2)
    size = dataclasses.replace(TINY, **{part: dataclasses.replace(TINY.vision, steps=5)})
    make = warmup.PARTS[part]

    def started(folder):
        torch.manual_seed(0)
        make(size, folder, CPU)

    started(tmp_path / "whole")
    whole = load_tensors(tmp_path / "whole" / f"{part}.pt")
    assert len(whole["loss"]) == 5 and not list((tmp_path / "whole").glob("*.state.pt"))

    cosine = warmup.cosine

    def end_at_step_3(step, *others):
        if step == 3:
            raise Ended
        return cosine(step, *others)

    monkeypatch.setattr(warmup, "cosine", end_at_step_3)
    with pytest.raises(Ended):
        started(tmp_path / "ended")
    monkeypatch.setattr(warmup, "cosine", cosine)
    make(size, tmp_path / "ended", CPU)
    ended = load_tensors(tmp_path / "ended" / f"{part}.pt")
    assert ended["loss"] == whole["loss"]
    assert all(torch.equal(ended["part"][name], value) for name, value in whole["part"].items())


def test_the_llm_learns_to_look_up(tmp_path):
    size = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, steps=40, batch=8, lr=1e-2))
    torch.manual_seed(0)
    warmup.warm_up_language(size, tmp_path, CPU)
    losses = load_tensors(tmp_path / "language.pt")["loss"]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "vision.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"vision\.pt cannot be read .* delete it and run the same command"):
        warmup.warm_up_low_vision(TINY, tmp_path, CPU)
