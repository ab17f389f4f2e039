"""The arms: what each of them changes, what it is given, and what a run leaves behind."""

import dataclasses

import numpy as np
import pytest
import torch

from bench.miniature.arms import ARMS, RESOLUTIONS, arm_config, build, processor
from bench.miniature.features import SeenPages, pages_of
from bench.miniature.pages import tokenizer
from bench.miniature.sizes import SIZES, base_config, mixture_of
from bench.miniature.storage import load_json
from bench.miniature.training import (
    SECOND_PAGE,
    Reader,
    answers,
    ask,
    draw_sample,
    evaluation_samples,
    restored,
    step_flops,
    steps_of,
    train,
)
from model.infimm_hd import IGNORE_INDEX

from .conftest import CPU, SOME_ARMS, TINY


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_arm_changes_one_thing(size):
    base = base_config(size)
    changed = {}
    for name in ARMS:
        config = arm_config(size, name)
        old, new = base.to_dict(), config.to_dict()
        changed[name] = {key for key in new if new[key] != old[key]} - {"transformers_version"}
    assert changed["dynamic"] == changed["text-only"] == set()
    assert changed["448"] == {"image"}
    assert changed["224"] == {"image", "vision_config"}
    assert changed["dynamic-no-position"] == {"position"}
    assert changed["224-resampler"] == {"image", "vision_config", "connector"}
    assert changed["448-resampler"] == {"image", "connector"}
    assert changed["interval-2"] == {"gated_cross_attention"}
    assert changed["llava-style"] == {"image", "fusion", "position", "connector"}
    assert changed["mixture-of-resolution"] == changed["llava-style"] | {"vision_config"}
    assert len(arm_config(size, "interval-2").gated_layers) == 2 * len(base.gated_layers)
    # the paper's share of a window's tokens: 64 of 1025 at 448, of 257 at 224
    tokens = arm_config(size, "448").visual_tokens_per_window
    assert abs(size.latents / tokens - 64 / 1025) < 0.01
    same = [
        arm_config(size, name).visual_tokens_per_window for name in ("llava-style", "mixture-of-resolution")
    ]
    assert same[0] == same[1]


def test_the_convnext_must_have_a_cell_for_each_patch():
    with pytest.raises(ValueError, match="needs the stride 16, got 8"):
        mixture_of(dataclasses.replace(TINY, convnext_depths=(1, 1), convnext_widths=(8, 16)))


def arguments_of(arm, folder, model=None):
    pages = SeenPages(folder, ARMS[arm].view, "held_out") if ARMS[arm].images else None
    model = model or build(TINY, arm, folder / "warm_up", 0)
    reader = Reader(model, arm, pages, CPU)
    words = SeenPages(folder, "low", "held_out").words
    return reader, [sample for _, sample in evaluation_samples(words)[:3]]


@pytest.mark.parametrize("arm", ["224", "448", "dynamic", "llava-style"])
def test_features_are_what_the_encoder_gives(warm, arm):
    """The same loss from pixels through the frozen encoder as from the features kept of it (float16)."""
    reader, samples = arguments_of(arm, warm)
    model = reader.model.eval()
    kept = model(**reader.arguments(samples)).loss.item()
    whole = build(TINY, arm, warm / "warm_up", 0).eval()
    pages, _ = pages_of(TINY, "held_out")
    views = [processor(TINY, ARMS[arm].view).process(pages[s[0][0]].pixels) for s in samples]
    arguments = reader.arguments(samples) | {
        "pixel_values": torch.cat([view.pixel_values for view in views]),
        "window_positions": torch.cat([view.window_positions for view in views]),
    }
    assert whole(**arguments).loss.item() == pytest.approx(kept, rel=1e-3)
    joining = {n: p for n, p in whole.named_parameters() if n.startswith(("gated_blocks", "vision_keys"))}
    for name, parameter in joining.items():  # with closed gates or small weights pixels would not matter
        if "gate" in name:
            torch.nn.init.ones_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    reader.model.load_state_dict(
        {n: p for n, p in whole.state_dict().items() if not n.startswith("vision.")}, strict=False
    )
    seen = whole(**arguments).loss.item()
    assert reader.model(**reader.arguments(samples)).loss.item() == pytest.approx(seen, rel=2e-3)
    if joining:
        assert seen != pytest.approx(kept, rel=1e-3)


def test_the_control_sees_nothing(warm):
    reader, samples = arguments_of("text-only", warm)
    found = reader.arguments(samples)
    assert set(found) == {"input_ids", "labels"}
    assert not (found["input_ids"] == reader.model.config.image_token_id).any()


def test_two_pages_are_asked_about(warm):
    words = SeenPages(warm, "single", "held_out").words
    asked = [sample for kind, sample in evaluation_samples(words) if kind == SECOND_PAGE]
    assert asked
    reader, _ = arguments_of("448", warm)
    found = reader.arguments(asked[:1], only_last=True)
    assert (found["input_ids"] == 2).sum() == 2 and found["images_per_sample"] == [2]
    (first, [before]), (second, [last]) = asked[0]
    assert second == first + 1 and before.text == last.text
    labels = found["labels"][found["labels"] != IGNORE_INDEX].tolist()
    assert tokenizer().decode(labels) == f"{last.answer} <|endofchunk|>"


def test_the_arms_of_a_seed_get_the_same_samples():
    rng = [np.random.default_rng([3, 7]) for _ in range(2)]
    pages, _ = pages_of(TINY, "train")
    words = [pages[i].words for i in range(4)]
    assert draw_sample(rng[0], TINY, words) == draw_sample(rng[1], TINY, words)


def test_equal_compute():
    many = dataclasses.replace(TINY, steps=1000)
    costs = {arm: step_flops(many, arm) for arm in RESOLUTIONS}
    assert costs["224"] < costs["448"] < costs["dynamic"]
    assert steps_of(TINY, "448", "steps") == TINY.steps
    for arm in RESOLUTIONS:
        spent = steps_of(many, arm, "compute") * costs[arm]
        assert spent == pytest.approx(1000 * costs["dynamic"], rel=1e-3)


@pytest.mark.parametrize("arm", SOME_ARMS)
def test_a_run_leaves_answers_and_a_model(trained, arm):
    found = load_json(trained / "arms" / f"{arm}-0-steps.json")
    words = SeenPages(trained, "low", "held_out").words
    asked = evaluation_samples(words)
    assert len(found["correct"]) == len(asked)
    assert (found["name"], found["seed"], found["match"], found["steps"]) == (arm, 0, "steps", TINY.steps)
    assert found["flops"] == TINY.steps * TINY.batch * step_flops(TINY, arm)
    model = restored(TINY, arm, 0, "steps", trained)
    fresh = build(TINY, arm, trained / "warm_up", 0)
    moved = {
        n.partition(".")[0]
        for (n, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert "language" in moved
    assert ("vision" in moved) == (arm == "mixture-of-resolution"), "encoders are frozen, adapters train"
    reader, samples = arguments_of(arm, trained, model)
    assert "".join("01"[right] for right in ask(reader, samples)) == found["correct"][: len(samples)]


def test_answers_are_those_of_generate(trained):
    """The first token of the teacher-forced answer is the one that greedy generation writes."""
    compared = 0
    model = restored(TINY, "mixture-of-resolution", 0, "steps", trained)
    reader, samples = arguments_of("mixture-of-resolution", trained, model)
    for sample, (given, expected) in zip(samples, answers(reader, samples), strict=True):
        arguments = reader.arguments([sample])
        labels = arguments.pop("labels")
        prompt = arguments.pop("input_ids")[:, : -len(expected)]
        assert (labels[0, -len(expected) :] == torch.tensor(expected)).all()
        written = model.generate(input_ids=prompt, max_new_tokens=1, **arguments)
        if given[0] != model.config.image_token_id:  # which is never written
            assert written[0, -1] == given[0]
            compared += 1
    assert compared


def test_gates_have_a_rate_of_their_own(warm):
    """At the rate of what they gate they opened so late that the arm never learned where words stand."""
    reader, _ = arguments_of("dynamic", warm)
    before = {name: p.detach().clone() for name, p in reader.model.named_parameters()}
    train(TINY, reader, reader.pages.words, 1, seed=0)
    moved = {name: (p - before[name]).abs().max().item() for name, p in reader.model.named_parameters()}
    gates = [moved.pop(name) for name in list(moved) if name.endswith("_gate")]
    assert gates == pytest.approx([TINY.lr_gates] * len(gates), rel=1e-3)
    assert 0 < max(moved.values()) < 1.1 * TINY.lr_joining


def test_the_resampler_has_a_rate_of_its_own(warm):
    """At the rate of the new parts beside it, it forgot its warm-up and its arm read nothing."""
    reader, _ = arguments_of("448-resampler", warm)
    for name, parameter in reader.model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.ones_(parameter)  # behind closed gates nothing moves in the first step
    before = {name: p.detach().clone() for name, p in reader.model.named_parameters()}
    train(TINY, reader, reader.pages.words, 1, seed=0)
    for part, rate in (("connector.", TINY.lr_resampler), ("gated_blocks.", TINY.lr_joining)):
        moved = [
            (p - before[name]).abs().max()
            for name, p in reader.model.named_parameters()
            if name.startswith(part) and not name.endswith("_gate")
        ]
        assert 0.9 * rate < max(moved) < 1.1 * rate, part


def test_a_model_learns_from_the_pages(warm):
    """A few steps on three samples: labels, gates and optimizer are joined up."""
    reader, samples = arguments_of("dynamic", warm)
    optimizer = torch.optim.AdamW(
        [p for p in reader.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    losses = []
    for _ in range(30):
        loss = reader.model(**reader.arguments(samples)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
