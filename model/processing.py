"""Text with `<image>` marks and images -> the model's keyword arguments; the Vicuna v1 conversation."""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ProcessorMixin

from .checks import require, require_choice, require_positive_ints
from .config import InfiMMHDConfig
from .image import ImageProcessor
from .picture import Picture

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_BODY = """\
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- IMAGE if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
_VICUNA_TEMPLATE = (
    _BODY
    + """\
{%- set system, turns = SYSTEM, messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system, turns = body(messages[0]['content']), messages[1:] -%}
{%- endif -%}
{%- if system -%}
    {{- system + ' ' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + body(message['content']) -}}
    {%- else -%}
        {{- ' ASSISTANT: ' + body(message['content']) + END -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' ASSISTANT:' -}}
{%- endif -%}
"""
)
_PLAIN_TEMPLATE = (
    _BODY
    + """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ' + body(message['content']) + END -}}
    {%- else -%}
        {{- body(message['content']) -}}
    {%- endif -%}
{%- endfor -%}
"""
)
_TEMPLATES = {"vicuna_v1": _VICUNA_TEMPLATE, "plain": _PLAIN_TEMPLATE}


def prompt_template(prompt: str, image_token: str, end_of_chunk_token: str) -> str:
    """The Jinja template of a processor with these tokens, for a form of the prompt.

    "vicuna_v1": `system USER: <image>question ASSISTANT: answer<end>USER: ...`; "plain":
    `<image>question answer<end>question ...`. ValueError for another name."""
    require_choice("prompt", prompt, list(_TEMPLATES))
    filled = _TEMPLATES[prompt]
    for name, value in (("IMAGE", image_token), ("END", end_of_chunk_token), ("SYSTEM", VICUNA_SYSTEM)):
        literal = json.dumps(value, ensure_ascii=False)
        filled = re.sub(rf"\b{name}\b", lambda _, literal=literal: literal, filled, count=1)
    return filled


class InfiMMHDProcessor(ProcessorMixin):
    """An `ImageProcessor` and a tokenizer of transformers that knows `image_token` and `end_of_chunk_token`.

    `image_seq_length=None`: a mark stays one token, as gated cross-attention wants it. An int n: each mark
    becomes n tokens for every window of its image, as in models that put image tokens between the text's.
    `chat_template` defaults to Vicuna v1.

    Text is cut at the two tokens, its pieces are tokenized each by itself and the ids of the two put between
    them, and the tokenizer's BOS, if it has one, stands in front: exactly as `train` makes its rows, whatever
    the tokenizer does at the beginning of a text or behind a special token."""

    # from_pretrained finds its arguments in __init__.__code__.co_argcount: none may be keyword-only
    def __init__(
        self,
        image_processor: ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        end_of_chunk_token: str = "<|endofchunk|>",
        chat_template: str | None = None,
    ) -> None:
        require(
            isinstance(image_processor, ImageProcessor),
            "image_processor",
            "be a model.ImageProcessor",
            type(image_processor).__name__,
        )
        require(
            isinstance(tokenizer, PreTrainedTokenizerBase),
            "tokenizer",
            "be a tokenizer of transformers",
            type(tokenizer).__name__,
        )
        if image_seq_length is not None:
            require_positive_ints({"image_seq_length": image_seq_length})
        ids = {}
        for argument, token in (("image_token", image_token), ("end_of_chunk_token", end_of_chunk_token)):
            ids[argument] = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
            known = ids[argument] not in (None, tokenizer.unk_token_id)
            require(known, argument, "be a token that the tokenizer knows", token)
        require(
            image_token != end_of_chunk_token, "image_token", "differ from end_of_chunk_token", image_token
        )
        self.image_seq_length = image_seq_length
        self.image_token, self.image_token_id = image_token, ids["image_token"]
        self.end_of_chunk_token, self.end_of_chunk_token_id = end_of_chunk_token, ids["end_of_chunk_token"]
        if chat_template is None:
            chat_template = prompt_template("vicuna_v1", image_token, end_of_chunk_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def for_model(
        cls, config: InfiMMHDConfig, tokenizer: PreTrainedTokenizerBase, prompt: str = "vicuna_v1"
    ) -> "InfiMMHDProcessor":
        """The processor of a model: its windows, its image tokens, the two tokens that its ids name, and the
        form of the prompt that it was trained with (`prompt_template`).

        ValueError where the tokenizer does not know them or has more tokens than the model."""
        vocab_size = config.text_config.vocab_size
        rule = f"have at most the model's {vocab_size} tokens"
        require(len(tokenizer) <= vocab_size, "tokenizer", rule, len(tokenizer))
        ids = [config.image_token_id, config.end_of_chunk_token_id]
        image_token, end_of_chunk_token = tokenizer.convert_ids_to_tokens(ids)
        image = ImageProcessor(
            window_size=config.vision_config.input_size,
            mode=config.image.mode,
            max_windows_per_side=config.image.max_windows_per_side,
            resize=config.image.resize,
        )
        template = prompt_template(prompt, image_token, end_of_chunk_token)
        return cls(image, tokenizer, config.image_seq_length, image_token, end_of_chunk_token, template)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        # transformers would go through AutoImageProcessor, which wants torchvision in some of its versions
        return [
            ImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, "images_per_sample"]

    def __call__(
        self,
        images: "Picture | list[Picture] | list[list[Picture]] | None" = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: bool | str = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """The keyword arguments of `InfiMMHD.forward` and `generate`.

        `text`: one string or several. `images`: None, one image, a flat list that the marks of the texts take
        in order, or one list per text. `padding` True or "longest" fills shorter rows on `padding_side`
        ("left", as generation needs it, or "right"); False wants rows of one length. `add_special_tokens`
        puts the BOS in front. `return_tensors`: "pt" (None means the same).

        `input_ids` and `attention_mask` [batch, text_len] int64, `images_per_sample` [batch] int64,
        `windows_per_image` [num_images] int64 and, if there is an image, `pixel_values`
        [num_windows, 3, P, P] float32 and `window_positions` [num_windows, 2] int64. ValueError for a wrong
        argument, for a picture that cannot be read, and where marks and images do not match."""
        require(videos is None and audio is None, "videos and audio", "be None", (videos, audio))
        kind = getattr(return_tensors, "value", return_tensors)
        require(kind in ("pt", None), "return_tensors", "be 'pt'", return_tensors)
        require(padding in (True, False, "longest"), "padding", "be True, 'longest' or False", padding)
        require(padding_side in ("left", "right"), "padding_side", "be 'left' or 'right'", padding_side)
        texts = [text] if isinstance(text, str) else text
        legal = isinstance(texts, (list, tuple)) and len(texts) > 0 and all(isinstance(t, str) for t in texts)
        require(legal, "text", "be a string or a list of strings, not empty", text)
        per_sample = self._images_of(images, [each.count(self.image_token) for each in texts])
        found = dict(self.image_processor([image for sample in per_sample for image in sample]))
        windows = iter(found["windows_per_image"].tolist())
        rows = []
        for number, (each, sample) in enumerate(zip(texts, per_sample, strict=True)):
            rows.append(self._ids(each, [next(windows) for _ in sample], add_special_tokens))
            require(bool(rows[-1]), "text", "give at least one token", f"none in sample {number}")
        found["images_per_sample"] = torch.tensor([len(sample) for sample in per_sample], dtype=torch.int64)
        return BatchFeature(self._padded(rows, bool(padding), padding_side) | found)

    def decode(self, token_ids: Tensor | Sequence[int], skip_special_tokens: bool = True, **kwargs) -> str:
        """One generated answer [new_tokens], without its prompt, as text: up to `end_of_chunk_token`, without
        padding and without white space around it. `kwargs` go to the tokenizer."""
        ids = [int(token) for token in token_ids]
        if self.end_of_chunk_token_id in ids:
            ids = ids[: ids.index(self.end_of_chunk_token_id)]
        while ids and ids[-1] == self.tokenizer.pad_token_id:
            ids.pop()
        start = next((i for i, token in enumerate(ids) if token != self.tokenizer.pad_token_id), 0)
        return self.tokenizer.decode(ids[start:], skip_special_tokens=skip_special_tokens, **kwargs).strip()

    def batch_decode(
        self, sequences: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """`decode` of every row, of [batch, new_tokens] or a list of lists."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | Tensor | BatchFeature:
        """Messages to text, or with `tokenize=True` to `input_ids`, with `return_dict=True` to all that
        `__call__` gives. `kwargs` go to transformers' method: `add_generation_prompt`,
        `continue_final_message`.

        A message is {"role": "user" | "assistant" | "system", "content": a string or a list of
        {"type": "text", "text": ...} and {"type": "image"[, "image" or "path": ...]} parts}. A system message
        comes first and replaces the default text, then user and assistant take turns; images are the user's.
        They are taken out of the parts, or from `processor_kwargs={"images": ...}`, whose other entries go to
        `__call__`. ValueError for other messages, and for a text that contains `image_token` or
        `end_of_chunk_token`, which would forge an image or the end of a turn."""
        mask = kwargs.get("return_assistant_tokens_mask", False)
        require(not mask, "return_assistant_tokens_mask", "be False (labels are made by train)", mask)
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        for number, messages in enumerate(conversation if batched else [conversation]):
            self._check_messages(messages, f"conversation[{number}]" if batched else "conversation")
        text = super().apply_chat_template(conversation, chat_template, **kwargs)
        if not tokenize:
            return text
        options = {"return_tensors": None if return_tensors == "auto" else return_tensors}
        options |= processor_kwargs or {}
        if options.get("images") is None:
            options["images"] = [_images_in(each) for each in (conversation if batched else [conversation])]
        found = self(text=text, **options)
        return found if return_dict else found["input_ids"]

    def _images_of(self, images: Any, marks: list[int]) -> list[list[Picture]]:
        """The images of each text; `marks` is the number of `image_token` in each."""
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if any(isinstance(each, (list, tuple)) for each in images):
            legal = all(isinstance(each, (list, tuple)) for each in images) and len(images) == len(marks)
            require(
                legal, "images", f"be one list for each of the {len(marks)} texts", f"{len(images)} entries"
            )
            given = [list(each) for each in images]
        else:
            ends = [sum(marks[: i + 1]) for i in range(len(marks))]
            given = [list(images[end - n : end]) for end, n in zip(ends, marks, strict=True)]
            given[-1] += images[ends[-1] :]
        for number, (sample, count) in enumerate(zip(given, marks, strict=True)):
            if len(sample) != count:
                rule = f"be as many as the {count} {self.image_token!r} in sample {number}"
                raise ValueError(f"images must {rule}, got {len(sample)}")
        return given

    def _ids(self, text: str, windows: list[int], add_special_tokens: bool) -> list[int]:
        """The token ids of one text; `windows` are those of its images."""
        ids = []
        bos = self.tokenizer.bos_token
        if bos is not None and (add_special_tokens or text.startswith(bos)):
            ids.append(self.tokenizer.bos_token_id)
            text = text.removeprefix(bos)
        remaining = iter(windows)
        marks = f"({re.escape(self.image_token)}|{re.escape(self.end_of_chunk_token)})"
        for piece in re.split(marks, text):
            if piece == self.image_token:
                copies = next(remaining) * (self.image_seq_length or 0)
                ids += [self.image_token_id] * (copies or 1)
            elif piece == self.end_of_chunk_token:
                ids.append(self.end_of_chunk_token_id)
            elif piece:
                ids += self._tokens(piece)
        return ids

    def _tokens(self, piece: str) -> list[int]:
        try:
            return self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        except Exception as error:  # tokenizers raises a bare one where a vocabulary has no unknown token
            rule = "be text that the tokenizer can read"
            raise ValueError(f"text must {rule}, got {piece[:120]!r}: {error}") from error

    def _padded(self, rows: list[list[int]], padding: bool, side: str) -> dict[str, Tensor]:
        lengths = [len(row) for row in rows]
        longest, pad = max(lengths), self.tokenizer.pad_token_id
        if min(lengths) < longest:
            require(padding, "padding", "be True where texts differ in length", f"lengths {lengths}")
            require(pad is not None, "tokenizer", "have a pad_token where texts differ in length", pad)
        input_ids = torch.full((len(rows), longest), 0 if pad is None else pad)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            input_ids[i, place] = torch.tensor(row)
            attention_mask[i, place] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _check_messages(self, messages: Any, name: str) -> None:
        legal = isinstance(messages, (list, tuple)) and all(isinstance(m, Mapping) for m in messages)
        require(legal and len(messages) > 0, name, "be a list of messages, not empty", messages)
        expected = ("system", "user")
        for number, message in enumerate(messages):
            here = f"{name}[{number}]"
            role = message.get("role")
            require(role in expected, f"{here}['role']", f"be {' or '.join(map(repr, expected))}", role)
            expected = ("assistant",) if role == "user" else ("user",)
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            legal = isinstance(parts, (list, tuple)) and all(isinstance(part, Mapping) for part in parts)
            require(legal, f"{here}['content']", "be a string or a list of parts", content)
            kinds = ("text", "image") if role == "user" else ("text",)
            for part in parts:
                kind, written = part.get("type"), part.get("text")
                rule = f"be {' or '.join(map(repr, kinds))} in a {role} message"
                require(kind in kinds, f"{here} part['type']", rule, kind)
                if kind == "text":
                    require(isinstance(written, str), f"{here} part['text']", "be a string", written)
                    for token in (self.image_token, self.end_of_chunk_token):
                        require(token not in written, f"{here} text", f"not contain {token!r}", written[:120])


def _images_in(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The images that the parts of the messages hold; a part may also only mark an image's place."""
    parts = [part for each in messages if not isinstance(each["content"], str) for part in each["content"]]
    return [part[key] for part in parts for key in ("image", "path") if part.get(key) is not None]


def register(config_class: type) -> None:
    """Makes AutoProcessor and AutoImageProcessor know the classes of this file, for models of that config;
    calling it again changes nothing. `InfiMMHDProcessor.from_pretrained` does not need it."""
    AutoProcessor.register(config_class, InfiMMHDProcessor, exist_ok=True)
    # under both names, as transformers looks for "torchvision" first where that is installed
    classes = {"pil": ImageProcessor, "torchvision": ImageProcessor}
    with contextlib.suppress(ImportError):  # transformers 5.17 has no AutoImageProcessor without torchvision
        AutoImageProcessor.register(config_class, image_processor_classes=classes, exist_ok=True)
