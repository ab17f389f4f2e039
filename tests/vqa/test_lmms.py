"""The adapter for lmms-eval against a stand-in for the parts of the harness that it meets."""

import dataclasses
import importlib
import sys
import types

import pytest
import torch

from model import InfiMMHD, InfiMMHDProcessor

from . import sets
from .conftest import save_model


class StandIn:
    """What lmms-eval's base class gives its models."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}
        self.cached = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))


@dataclasses.dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@dataclasses.dataclass
class Request:
    args: tuple


@pytest.fixture
def adapter_module(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    base = types.ModuleType("lmms_eval.api.model")
    base.lmms = StandIn
    registry = types.ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = Manifest
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", base)
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    monkeypatch.delitem(sys.modules, "bench.vqa.lmms", raising=False)
    yield importlib.import_module("bench.vqa.lmms")
    sys.modules.pop("bench.vqa.lmms", None)


DOCUMENTS = [{"question": f"What is {i}?", "image": sets.picture(i)} for i in range(4)]


def messages(document: dict) -> list[dict]:
    image = {"type": "image", "url": document["image"]}
    return [{"role": "user", "content": [image, {"type": "text", "text": document["question"]}]}]


@pytest.fixture
def adapter(adapter_module, saved):
    made = adapter_module.InfiMMHDForLmmsEval(str(saved), batch_size=2, device="cpu")
    made.task_dict["task"] = {"test": DOCUMENTS}
    return made


def generation(number: int, to_messages=messages, **arguments) -> Request:
    return Request(
        (f"context {number}", to_messages, {"max_new_tokens": 4} | arguments, number, "task", "test")
    )


def greedy(saved, document: dict, **options) -> str:
    model, processor = InfiMMHD.from_pretrained(saved).eval(), InfiMMHDProcessor.from_pretrained(saved)
    inputs = processor(images=[document["image"]], text=[f"<image>{document['question']}"])
    tokens = model.generate(**inputs, **({"max_new_tokens": 4} | options))
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_lmms_eval_finds_a_chat_model(adapter_module):
    manifest = adapter_module.manifest()
    assert manifest == Manifest("infimm_hd", chat_class_path="bench.vqa.lmms.InfiMMHDForLmmsEval")
    assert adapter_module.InfiMMHDForLmmsEval.is_simple is False
    assert issubclass(adapter_module.InfiMMHDForLmmsEval, StandIn)
    text = (sets.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\ninfimm_hd = "bench.vqa.lmms:manifest"' in text


def test_without_lmms_eval_only_this_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "bench.vqa.lmms", raising=False)
    importlib.import_module("bench.vqa.run")
    with pytest.raises(ImportError, match="lmms_eval"):
        importlib.import_module("bench.vqa.lmms")


def test_answers_keep_the_order_of_the_requests(adapter, saved):
    """Sorted by windows and by two sets of arguments inside."""
    requests = [generation(i, num_beams=1 + (i == 2)) for i in (3, 1, 2, 0)]
    answers = adapter.generate_until(requests)
    expected = [greedy(saved, DOCUMENTS[i], num_beams=1 + (i == 2)) for i in (3, 1, 2, 0)]
    assert answers == expected and len(set(answers)) > 1
    assert sorted(entry[2] for entry in adapter.cached) == sorted(answers)
    assert {entry[1][0] for entry in adapter.cached} == {f"context {i}" for i in range(4)}


def test_answers_end_before_until_and_within_the_model(adapter, saved):
    (whole,) = adapter.generate_until([generation(1)])
    (cut,) = adapter.generate_until([generation(1, until=["\n\n", whole[1]])])
    assert cut == whole[: whole.index(whole[1])].strip()
    (cut,) = adapter.generate_until([generation(1, until=whole[1])])
    assert cut == whole[: whole.index(whole[1])].strip()
    adapter.model.language.config.max_position_embeddings = 20  # the prompt has 12 tokens
    (longest,) = adapter.generate_until([generation(1, max_new_tokens=100_000)])
    assert longest == greedy(saved, DOCUMENTS[1], max_new_tokens=8)


def test_sampling_and_arguments_that_are_not_used(adapter, caplog):
    torch.manual_seed(0)
    arguments = dict(temperature=5.0, top_p=None, max_new_tokens=12, image_aspect_ratio="pad")
    sampled = {adapter.generate_until([generation(1, **arguments)])[0] for _ in range(4)}
    assert len(sampled) > 1
    assert caplog.text.count("generation arguments that are not used: image_aspect_ratio") == 1
    same = {adapter.generate_until([generation(1, temperature=0, top_p=0.5)])[0] for _ in range(2)}
    assert len(same) == 1


def test_system_texts_and_plain_contents(adapter_module, tmp_path):
    save_model(tmp_path / "model")
    processor = InfiMMHDProcessor.from_pretrained(tmp_path / "model")
    asked = []
    adapter = adapter_module.InfiMMHDForLmmsEval(str(tmp_path / "model"), device="cpu", system="Be brief.")
    adapter.task_dict["task"] = {"test": DOCUMENTS}
    adapter._inputs = lambda conversations, **options: asked.extend(conversations) or processor(text=["x"])
    adapter.generate_until([generation(0, lambda document: [{"role": "user", "content": "What?"}])])
    with_system = [{"role": "system", "content": [{"type": "text", "text": "Be long."}]}]
    adapter.generate_until([generation(0, lambda document: with_system + messages(document))])
    assert asked[0][0] == {"role": "system", "content": "Be brief."} and asked[0][1]["content"] == "What?"
    assert asked[1][0] == {"role": "system", "content": "Be long."}
    assert asked[1][1]["content"][0] == {"type": "image", "image": DOCUMENTS[0]["image"]}


def test_rounds_until_the_task_says_so(adapter, saved):
    heard = []

    def rounds(document, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages(document)
        heard.append((round_idx, previous_output, previous_round_info))
        return messages(DOCUMENTS[round_idx]), round_idx == 3, previous_output, {"round": round_idx}

    (answers,) = adapter.generate_until_multi_round([generation(0, rounds)])
    assert answers == [greedy(saved, DOCUMENTS[i]) for i in range(3)]
    assert heard == [
        (1, answers[:1], None),
        (2, answers[:2], {"round": 1}),
        (3, answers, {"round": 2}),
    ]

    def one_round(document, round_idx=None, **_):
        return messages(document) if round_idx is None else None

    assert adapter.generate_until_multi_round([generation(1, one_round)]) == [[greedy(saved, DOCUMENTS[1])]]


def likelihood(number: int, answer) -> Request:
    document = DOCUMENTS[number]
    return Request((document["question"], answer, lambda d: [d["image"]], number, "task", "test"))


def test_likelihood_is_the_loss_of_the_answer(adapter, saved):
    """The same as the model's own loss with labels; the space before the answer is the template's."""
    model, processor = InfiMMHD.from_pretrained(saved).eval(), InfiMMHDProcessor.from_pretrained(saved)
    (found,) = adapter.loglikelihood([likelihood(2, " yes")])
    text = f"<image>{DOCUMENTS[2]['question']}"
    inputs = processor(images=[DOCUMENTS[2]["image"]], text=[f"{text} yes<|endofchunk|>"])
    prompt = len(processor.tokenizer(DOCUMENTS[2]["question"]).input_ids) + 2  # BOS and the image
    labels = inputs["input_ids"].clone()
    labels[:, :prompt] = -100
    loss = model(**inputs, labels=labels).loss
    assert labels[0, prompt:].tolist() == processor.tokenizer(" yes").input_ids + [3]
    assert found[0] == pytest.approx(loss.item(), rel=1e-5) and found[1] is False


def test_the_greedy_answer_is_greedy_and_the_likeliest_option(adapter, saved):
    """With a model that is trained, for a moment, to say yes."""
    model, processor = adapter.model, adapter.processor
    text = f"<image>{DOCUMENTS[1]['question']} yes<|endofchunk|>"
    inputs = processor(images=[DOCUMENTS[1]["image"]], text=[text])
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    head = model.requires_grad_(False).language.get_output_embeddings().requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.03)
    for _ in range(30):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    found = adapter.loglikelihood(
        [likelihood(1, " yes"), likelihood(1, " no"), likelihood(1, lambda d: "yes")]
    )
    assert found[0] == found[2] and found[0][1] is True and found[1][1] is False
    assert min(found) == found[0]  # the harness takes the smallest


def test_likelihood_of_a_text_alone(adapter):
    (found,) = adapter.loglikelihood([Request(("", "yes"))])
    assert found[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, or auto, got 0"),
        (dict(batch_size="many"), "batch_size must be at least 1, or auto, got 'many'"),
        (dict(pretrained="nowhere"), "--model must be a folder with a saved model and processor"),
        (dict(dtype="int8"), "--dtype must be one of"),
    ],
)
def test_wrong_arguments(adapter_module, saved, options, message):
    with pytest.raises(ValueError, match=message):
        adapter_module.InfiMMHDForLmmsEval(**({"pretrained": str(saved)} | options))


def test_several_processes_and_videos_are_refused(adapter, adapter_module, saved, monkeypatch):
    def video(document):
        return [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]

    with pytest.raises(ValueError, match="content must be text and images for this model, got 'video'"):
        adapter.generate_until([generation(0, video)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE must be 1 for this adapter, got '2'"):
        adapter_module.InfiMMHDForLmmsEval(str(saved))
    monkeypatch.delenv("WORLD_SIZE")
    assert adapter_module.InfiMMHDForLmmsEval(str(saved), "auto", max_batch_size="3").batch_size == 3
