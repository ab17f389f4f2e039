"""Mixtures: shares exact in every block, every sample of a source once an epoch, manifests checked."""

import collections
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model import ImageProcessor
from train.batch import RowEncoder, StepReader
from train.config import DataConfig
from train.data import BadSample, Mixture, Sample, build_dataset, mixture
from train.data.augment import LENGTHS, NAMED_COLOURS, QUESTIONS, TextAugmented, paint_texts
from train.data.manifest import load_manifest
from train.data.painting import COLOUR_VALUES, MIN_COLOUR_DISTANCE
from train.data.templates import TEMPLATES

from .tiny_stage import messages, write_conversations


class Named:
    def __init__(self, name: str, length: int, prompt: str | None = None) -> None:
        self.name, self.length, self.prompt = name, length, prompt

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.length
        return Sample([], [("which ?", "red " * (1 + index % 5))], self.prompt, f"{self.name} {index}")


@settings(max_examples=8, deadline=None)
@given(
    weights=st.lists(st.floats(1, 900), min_size=1, max_size=9),
    seed=st.integers(0, 2**63 - 1),
    block=st.integers(0, 10**9),
    shuffle=st.booleans(),
)
def test_every_block_holds_the_exact_shares(weights, seed, block, shuffle):
    sources = [Named(str(i), 10**12 + i) for i in range(len(weights))]
    mixed = Mixture(sources, weights)
    start = block * mixture.BLOCK
    positions = range(start, start + mixture.BLOCK)
    read = [mixed.locate(index) for index in mixed.indices_at(positions, seed, shuffle)]
    counts = collections.Counter(source for source, _ in read)
    assert [counts[i] for i in range(len(weights))] == mixed.quotas and sum(mixed.quotas) == mixture.BLOCK
    for quota, weight in zip(mixed.quotas, weights, strict=True):
        assert abs(quota - mixture.BLOCK * weight / sum(weights)) < 1
    assert len(set(read)) == mixture.BLOCK  # long sources: nothing twice


def test_each_source_is_read_epoch_by_epoch():
    lengths = [7, 50, 1]
    mixed = Mixture([Named(str(i), n) for i, n in enumerate(lengths)], [1, 3, 0.1])
    read = collections.defaultdict(list)
    positions = range(3 * mixture.BLOCK)
    for position, place in zip(positions, mixed.indices_at(positions, 5, True), strict=True):
        source, index = mixed.locate(place)
        read[source].append((position, index))
    for source, length in enumerate(lengths):
        draws = [index for _, index in read[source]]
        for start in range(0, len(draws) - length + 1, length):
            assert sorted(draws[start : start + length]) == list(range(length))
    # the seed permutes the sources' order and each source
    assert mixed.indices_at(range(200), 6, True) != mixed.indices_at(range(200), 5, True)
    assert mixed.indices_at([70, 3], 5, True) == [mixed.indices_at(range(99), 5, True)[p] for p in (70, 3)]
    near = [mixed.locate(index)[0] for index in mixed.indices_at(range(256), 5, True)]
    assert 35 < near.count(0) < 95 and 160 < near.count(1) < 220


def test_without_shuffling_sources_alternate_in_their_own_order():
    mixed = Mixture([Named("a", 100), Named("b", 100)], [3, 1])
    read = [mixed[index].origin for index in mixed.indices_at(range(12), 0, False)]
    assert [name for name in read if name[0] == "a"] == [f"a {i}" for i in range(9)]
    assert [name for name in read if name[0] == "b"] == [f"b {i}" for i in range(3)]
    assert [name[0] for name in read].index("b") < 4


def test_a_mixture_is_an_indexed_dataset_too():
    endless = Named("c", sys.maxsize)
    mixed = Mixture([Named("a", 3), Named("b", 2, "plain"), endless], [1, 1, 1], prompts=["vicuna_v1"] * 3)
    assert len(mixed) == sys.maxsize and mixed.names == ["0", "1", "2"]
    assert [mixed[i].origin for i in range(6)] == ["a 0", "a 1", "a 2", "b 0", "b 1", "c 0"]
    # a sample that names its form keeps it
    assert [mixed[i].prompt for i in (0, 4)] == ["vicuna_v1", "plain"]
    assert mixed.image_sizes(0) == [] and mixed.num_images(0) == 0
    inner = Mixture([Mixture([Named("a", 3), Named("b", 3)], [1, 1]), endless], [1, 1])
    assert {inner[index].origin[0] for index in inner.indices_at(range(50), 0, True)} == {"a", "b", "c"}
    for index in (-1, 5 + sys.maxsize):
        with pytest.raises(IndexError):
            mixed.locate(index)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], "weight of 'b' must be a positive number, got 0"),
        ([1, "2"], "weight of 'b' must be a positive number, got '2'"),
        ([1, float("inf")], "weight of 'b' must be a positive number, got inf"),
        ([True, 1], "weight of 'a' must be a positive number, got True"),
        ([1, 1e-6], "weight of 'b' must be at least about 0.0001, one of 10000 samples, got 1e-06"),
        ([1], "weights must be one for each of the 2 sources"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture([Named("a", 3), Named("b", 3)], weights, names=["a", "b"])


def test_steps_of_a_mixture_do_not_depend_on_the_ranks(tokenizer):
    mixed = Mixture([Named("a", 30), Named("b", 7, "plain")], [2, 1])
    encoder = RowEncoder(
        tokenizer,
        ImageProcessor(window_size=28),
        prompt="vicuna_v1",
        sequence_length=64,
        image_token_id=2,
        end_token_id=3,
    )

    def rows_of(world_size: int, step: int) -> list[list[int]]:
        found = []
        for rank in range(world_size):
            reader = StepReader(
                mixed,
                encoder,
                DataConfig(),
                seed=1,
                global_batch_size=12,
                micro_batch_size=3,
                pad_token_id=0,
                rank=rank,
                world_size=world_size,
            )
            for batch in reader(step).micro_batches:
                rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
                found += [row[mask].tolist() for row, mask in rows]
        return found

    for step in (0, 1, 901):
        assert rows_of(1, step) == rows_of(2, step) == rows_of(4, step)
        lengths = [len(row) for row in rows_of(1, step)]
        assert min(lengths) < 12 < 20 < max(lengths)  # plain and vicuna rows


@pytest.fixture
def written(tmp_path):
    write_conversations(tmp_path / "data", 6)

    def write(*sets: object):
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps({"sets": list(sets)}))
        return path

    return write


TALK = {"name": "talk", "reader": "conversations", "path": "data/records.jsonl"}


def test_a_manifest_becomes_a_mixture(written, tmp_path):
    path = written(TALK, TALK | {"name": "more", "weight": 2, "prompt": "plain", "image_root": "data"})
    mixed = build_dataset(DataConfig(name="manifest", path=str(path)))
    assert mixed.names == ["talk", "more"] and mixed.quotas == [7500, 2500]  # 6 samples against weight 2
    assert len(mixed) == 12 and mixed[0].prompt is None and mixed[6].prompt == "plain"
    assert mixed[7].images == [tmp_path / "data" / "1.jpg"] and mixed.image_sizes(7) == [(30, 40)]
    assert mixed.num_images(3) == 0


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "data.path must be a manifest with a list 'sets'"),
        ([3], "set 1: set must be a JSON object, got 3"),
        ([TALK | {"wheight": 1}], "set 'talk': key must be one of .*did you mean 'weight'"),
        ([TALK | {"name": ""}], "set 1: name must be a text, got ''"),
        ([TALK, TALK], "set 'talk': name must be another one than those before it"),
        ([TALK | {"reader": "manifest"}], "reader must be the name of a dataset, not a manifest"),
        ([TALK | {"reader": "conversation"}], "set 'talk': data.name must be .*did you mean 'conversations'"),
        ([TALK | {"prompt": "chatml"}], "prompt must be one of 'vicuna_v1', 'plain', got 'chatml'"),
        ([TALK | {"options": [1]}], r"options must be a JSON object, got \[1\]"),
        ([TALK | {"options": {"split": 1}}], "set 'talk': data.options must fit dataset 'conversations'"),
        (
            [TALK | {"path": "gone.jsonl"}],
            "set 'talk': data.path must be an existing file, got '.*gone.jsonl'",
        ),
        ([TALK | {"path": 3}], "set 'talk': data.path must be the name of a file, got 3"),
        ([TALK | {"image_root": "gone"}], "set 'talk': data.image_root must be an existing folder"),
        ([TALK | {"weight": -1}], "manifest.json: weight of 'talk' must be a positive number, got -1"),
        ([TALK, TALK | {"name": "b", "weight": 1e-9}], "manifest.json: weight of 'b' must be at least about"),
        ([TALK | {"augment": 1}], "augment must be true, false or a JSON object, got 1"),
        ([TALK | {"augment": {"sead": 1}}], "augment must have the keys seed and num_questions, got 'sead'"),
        ([TALK | {"augment": {"seed": -1}}], "augment.seed must be an int of at least 0, got -1"),
        ([TALK | {"augment": {"num_questions": 7}}], "augment.num_questions must lie in 1..6, got 7"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(written, sets, message):
    path = written(*sets)
    with pytest.raises(ValueError, match=message):
        load_manifest(path)


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="data.path must be an existing file, got 'gone.json'"):
        load_manifest("gone.json")
    path = tmp_path / "a.json"
    for content, message in (
        ("{", "must be a JSON manifest"),
        ("[]", "must be a manifest with a list 'sets'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_manifest(path)


def test_templates_are_the_papers_sets():
    sets = {name: make()["sets"] for name, make in TEMPLATES.items()}
    total = sum(entry["weight"] for entry in sets["table1"])
    assert len(sets["table1"]) == 15 and total == 2_009_000
    weights = {entry["name"]: entry["weight"] for entry in sets["table1"]}
    assert weights["vqav2"] == 443_000 and weights["gqa"] + weights["gqa_text"] == 471_000
    assert [entry["name"] for entry in sets["ift"]] == ["llava_665k", "llavar", "scienceqa", "textvqa"]
    assert [entry["weight"] for entry in sets["pt"]] == [10_240, 384, 384]
    for entries in sets.values():
        # no weight is so small that a set would not be read
        Mixture([Named("x", 9)] * len(entries), [entry.get("weight", 1) for entry in entries])


def test_a_template_reads_its_files_once_they_are_there(tmp_path):
    """Every set of Table 1 is built from files of the published form, at the places the template names."""
    (tmp_path / "any").mkdir()
    question = {"question": "Which?", "question_id": 1, "image_id": 1, "answers": ["a"], "answer": "a"}
    contents = {
        "captions": {"annotations": [{"image_id": 1, "caption": "a"}], "data": [{"caption_str": "a"}]},
        "regions": [{"id": 1, "regions": [{}]}],
        "conversations": [{"conversations": messages("Which?", "red")}],
    }
    manifest = TEMPLATES["table1"]()
    for entry in manifest["sets"]:
        content = contents.get(entry["reader"])
        if content is None:
            wrapped = {"questions": [question], "data": [question]}
            form = entry["options"]["form"]
            content = [question] if form in ("vizwiz", "aokvqa") else wrapped
        elif entry["reader"] == "captions":
            content = content | {"images": [{"id": 1, "file_name": "1.jpg"}]}
        for name in (entry["path"], entry.get("options", {}).get("annotations")):
            if name is not None:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                is_answers = name != entry["path"]
                text = json.dumps({"annotations": [question]} if is_answers else content)
                (tmp_path / name).write_text(text)
        (tmp_path / entry["image_root"]).mkdir(parents=True, exist_ok=True)
    path = tmp_path / "cpt.json"
    path.write_text(json.dumps(manifest))
    assert load_manifest(path).names == [entry["name"] for entry in manifest["sets"]]


class Pictures:
    def __init__(self, size: tuple[int, int] = (200, 300), ground: int = 128) -> None:
        self.size, self.ground = size, ground

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Sample:
        image = np.full((*self.size, 3), self.ground, np.uint8)
        return Sample([image], [("<image>which ?", "red")], "plain", f"picture {index}")


def test_augmentation_paints_what_it_asks_for():
    dataset = TextAugmented(Pictures(), seed=3, num_questions=6)
    places = ("left top", "right bottom")
    kinds = {text.format(place=place): (kind, place) for kind, text in QUESTIONS.items() for place in places}
    for index in range(40):
        sample = dataset[index]
        assert sample.turns[0] == ("<image>which ?", "red") and len(sample.turns) == 7
        answers = {kinds[question]: answer for question, answer in sample.turns[1:]}
        (pixels,) = sample.images
        changed = np.argwhere((pixels != 128).any(-1))
        top_left = changed[(changed < (100, 150)).all(-1)]
        bottom_right = changed[(changed >= (100, 150)).all(-1)]
        assert len(top_left) + len(bottom_right) == len(changed)  # nothing in the other two corners
        for place, where in (("left top", top_left), ("right bottom", bottom_right)):
            text, colour = answers["characters", place], answers["colour", place]
            assert LENGTHS[0] <= len(text) <= LENGTHS[1] and answers["count", place] == str(len(text))
            strokes = pixels[tuple(where.T)].astype(float)
            distance = np.abs(strokes - NAMED_COLOURS[colour]).max(1)
            assert (distance < 45).sum() > 5  # the middles of the strokes have the named colour
            assert np.abs(np.array(NAMED_COLOURS[colour]) - 128.0).sum() > MIN_COLOUR_DISTANCE
        assert answers["colour", "left top"] != answers["colour", "right bottom"]
        assert sample.prompt == "plain" and sample.origin == f"picture {index}"
    assert len(COLOUR_VALUES) == 6


def test_augmentation_depends_on_seed_and_index_alone():
    first, again, other = (TextAugmented(Pictures(), seed=seed) for seed in (3, 3, 4))
    again[9]
    assert np.array_equal(first[5].images[0], again[5].images[0]) and first[5].turns == again[5].turns
    assert first[5].turns != other[5].turns or not np.array_equal(first[5].images[0], other[5].images[0])
    assert not np.array_equal(first[5].images[0], first[6].images[0])
    assert len(first[5].turns) == 3
    asked = {question for i in range(60) for question, _ in first[i].turns[1:]}
    assert len(asked) == 6


@pytest.mark.parametrize("size", [(40, 60), (448, 448), (40, 2000), (2000, 60)])
def test_strings_are_inside_the_image_and_apart(size):
    for seed in range(20):
        image = np.full((*size, 3), 255, np.uint8)
        _, (first, second) = paint_texts(np.random.default_rng(seed), image, "here")
        assert min(first.box) >= 0
        assert second.box[2] <= size[1] and second.box[3] <= size[0]
        assert first.box[2] < second.box[0] and first.box[3] < second.box[1]


def test_samples_that_cannot_be_painted_are_named(tmp_path):
    class NoImage(Pictures):
        def __getitem__(self, index: int) -> Sample:
            return Sample([], [("which ?", "red")])

    for dataset, reason, message in (
        (NoImage(), "no_image", "sample 0: sample must have an image to paint on"),
        (Pictures((8, 300)), "small_image", "picture 0: image must be large enough for text .*300 x 8"),
        (Pictures((300, 8)), "small_image", "got 8 x 300"),
        (Pictures((0, 9)), "unreadable_image", "picture 0: image must"),
    ):
        with pytest.raises(BadSample, match=message) as error:
            TextAugmented(dataset)[0]
        assert error.value.reason == reason


def test_an_augmented_set_of_a_manifest_is_balanced_by_its_images(written, tmp_path):
    for i in range(6):
        Image.new("RGB", (80, 60), (i * 20, 9, 9)).save(tmp_path / "data" / f"{i}.jpg")
    mixed = load_manifest(written(TALK | {"augment": {"seed": 1, "num_questions": 1}}))
    assert mixed.image_sizes(0) == [(60, 80)] and mixed.num_images(1) == 1
    assert mixed[0].images[0].shape == (60, 80, 3) and len(mixed[0].turns) == 2
    assert not hasattr(TextAugmented(Pictures()), "image_sizes")
