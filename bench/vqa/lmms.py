"""lmms-eval's adapter: `python -m lmms_eval --model infimm_hd --model_args pretrained=DIR --tasks ...`.

Needs lmms-eval (the extra `lmms`), which finds `manifest` through its entry-point group in an install of the
checkout; nothing else here imports this file. Checked against a stand-in for the harness and, by hand,
against the base class, registry, requests and chat messages of lmms-eval 0.7.3. Not run against the real
thing: a whole evaluation of one of its tasks, which wants its 52 requirements and downloads. One process on
one device; video and audio are refused."""

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms

from model import talk
from train.data.images import image_size

_LOGGER = logging.getLogger(__name__)
_GENERATION = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "until")


def manifest() -> Any:
    """What the entry point hands to lmms-eval: the name of the model and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="infimm_hd", chat_class_path=f"{__name__}.InfiMMHDForLmmsEval")


class InfiMMHDForLmmsEval(lmms):
    """A saved InfiMM-HD and its processor as a chat model of lmms-eval.

    `pretrained`: folder of `save_pretrained`; `dtype`, `device` as in `python -m model`; `system` replaces
    the chat template's own system text. Requests are batched by their generation arguments and sorted by the
    number of windows. Greedy unless a task asks for a temperature above 0."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        system: str | None = None,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        size = str(max_batch_size or 1) if batch_size == "auto" else str(batch_size)
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"batch_size must be at least 1, or auto, got {batch_size!r}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"WORLD_SIZE must be 1 for this adapter, got {os.environ['WORLD_SIZE']!r}")
        self.batch_size, self.system = int(size), system
        options = argparse.Namespace(model=Path(pretrained), device=device, dtype=dtype, system=None)
        loaded = talk.load(options)
        self.model, self.processor = loaded.model.eval(), loaded.processor
        self._unused: set[str] = set()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests, whose `args` are (context, doc_to_messages, generation
        arguments, doc_id, task, split); answers end before the first of the strings `until`."""
        conversations, groups = [], {}
        for number, request in enumerate(requests):
            _, doc_to_messages, arguments, *place = request.args
            conversations.append(self._conversation(doc_to_messages(self._document(*place))))
            groups.setdefault(json.dumps(arguments, sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        for members in groups.values():
            members.sort(key=lambda number: self._windows(conversations[number]))
            arguments = requests[members[0]].args[2]
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                found = self._generate([conversations[number] for number in batch], arguments)
                for number, answer in zip(batch, found, strict=True):
                    answers[number] = answer
                    context = requests[number].args[0]
                    self.cache_hook.add_partial("generate_until", (context, arguments), answer)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of every round. After each the task's doc_to_messages is asked with round_idx,
        previous_output and previous_round_info for (messages, whether that was all, output, info)."""
        return [self._rounds(*request.args[1:]) for request in requests]

    def _rounds(self, doc_to_messages: Any, arguments: Mapping[str, Any], *place: Any) -> list[str]:
        document, information = self._document(*place), None
        messages = doc_to_messages(document)
        outputs: list[str] = []
        while True:
            outputs += self._generate([self._conversation(messages)], arguments)
            found = doc_to_messages(
                document,
                round_idx=len(outputs),
                previous_output=list(outputs),
                previous_round_info=information,
            )
            if not (isinstance(found, tuple) and len(found) == 4) or found[1]:
                return outputs
            messages, _, _, information = found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of the tokens of an answer and its end, and whether greedy decoding
        gives it: the harness takes the option with the smallest number, whatever the name says.

        `args` are (context, answer or doc_to_target, doc_to_visual, doc_id, task, split), or the first two.
        """
        return [self._likelihood(*request.args) for request in requests]

    @torch.no_grad()
    def _likelihood(
        self, context: str, answer: Any, doc_to_visual: Any = None, *place: Any
    ) -> tuple[float, bool]:
        document = self._document(*place) if place else None
        images = list(doc_to_visual(document) or ()) if doc_to_visual is not None else []
        answer = answer(document) if callable(answer) else answer
        parts = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": context}]
        asked = self._conversation([{"role": "user", "content": parts}])
        # the chat template puts the space between a question and its answer
        told = [*asked, {"role": "assistant", "content": str(answer).strip()}]
        prompt = self._inputs([asked], add_generation_prompt=True)["input_ids"][0].tolist()
        inputs = self._inputs([told])
        ids = inputs["input_ids"][0]
        pairs = zip(prompt, ids.tolist(), strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(ids) - 1))
        start = max(start, 1)  # the first token of all is given
        logits = self.model(**inputs).logits[0, start - 1 : -1].float()
        targets = ids[start:]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return float(loss), bool((logits.argmax(-1) == targets).all())

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """lmms-eval's messages as the processor takes them."""
        found = [
            {"role": message["role"], "content": _content(message["content"], message["role"])}
            for message in messages
        ]
        if self.system is not None and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": self.system})
        return found

    def _windows(self, conversation: Sequence[Mapping[str, Any]]) -> int:
        processor, total = self.processor.image_processor, 0
        for image in _images(conversation):
            rows, columns = processor.grid_of(*(image_size(image) or (1, 1)))
            total += rows * columns
        return total

    def _inputs(self, conversations: list[Any], **options: Any) -> Any:
        return self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, **options
        ).to(self.device)

    def _generate(self, conversations: list[Any], arguments: Mapping[str, Any]) -> list[str]:
        inputs = self._inputs(conversations, add_generation_prompt=True)
        width = inputs["input_ids"].shape[1]
        tokens = self.model.generate(**inputs, **self._options(arguments, width))
        answers = self.processor.batch_decode(tokens[:, width:])
        until = arguments.get("until") or []
        return [_before(answer, [until] if isinstance(until, str) else until) for answer in answers]

    def _options(self, arguments: Mapping[str, Any], width: int) -> dict[str, Any]:
        """An answer gets no more tokens than the model has positions left."""
        unused = set(arguments) - set(_GENERATION) - self._unused
        if unused:
            self._unused |= unused
            _LOGGER.warning("generation arguments that are not used: %s", ", ".join(sorted(unused)))
        found: dict[str, Any] = {}
        if arguments.get("max_new_tokens") is not None:
            room = self.model.language.config.max_position_embeddings - width
            found["max_new_tokens"] = max(1, min(int(arguments["max_new_tokens"]), room))
        if (arguments.get("num_beams") or 1) > 1:
            found["num_beams"] = int(arguments["num_beams"])
        if (arguments.get("temperature") or 0) > 0 and arguments.get("do_sample", True):
            found |= dict(do_sample=True, temperature=float(arguments["temperature"]))
            found["top_p"] = float(1 if arguments.get("top_p") is None else arguments["top_p"])
        return found


def _content(content: Any, role: str) -> Any:
    if isinstance(content, str) or role != "user":
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        return "".join(texts)
    parts = []
    for part in content:
        kind = part["type"]
        if kind not in ("text", "image"):
            raise ValueError(f"content must be text and images for this model, got {kind!r}")
        name = "text" if kind == "text" else "image"
        parts.append({"type": kind, name: part["text"] if kind == "text" else part["url"]})
    return parts


def _images(conversation: Sequence[Mapping[str, Any]]) -> list[Any]:
    parts = [part for message in conversation if message["role"] == "user" for part in message["content"]]
    return [part["image"] for part in parts if isinstance(part, dict) and part["type"] == "image"]


def _before(text: str, ends: Sequence[str]) -> str:
    places = [text.find(end) for end in ends if end]
    return text[: min((place for place in places if place >= 0), default=len(text))].strip()
