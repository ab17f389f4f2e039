"""Words, pictures and configs of a size that trains in milliseconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import InfiMMHD, InfiMMHDConfig, preset
from train.config import TrainConfig
from train.data import Sample
from train.overrides import override
from train.recipes import RECIPES

# fmt: off
WORDS = ["<pad>", "<s>", "<image>", "<end>", "<unk>", "USER:", "ASSISTANT:",
         "which", "colour", "how", "bright", "?", "red", "green", "blue", "dark", "light"]
# fmt: on
COLOURS = ("red", "green", "blue")
ALL_PARTS = ("vision", "gated_cross_attention", "language")

MODEL_OPTIONS = {
    "vision_config": {"hidden_size": 32, "num_layers": 2, "num_heads": 1, "intermediate_size": 64},
    "gated_cross_attention": {"num_heads": 2, "head_dim": 16},
    "text_config": {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


class Colours:
    """Endless plain pictures; every fourth sample has no picture, and answers differ in length."""

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, index: int) -> Sample:
        colour, bright = index % 3, index // 3 % 2
        turns = [("which colour ?", COLOURS[colour])]
        if index % 2:
            turns.append(("how bright ?", "light red" if bright else "dark"))
        if index % 4 == 3:
            return Sample([], turns)
        picture = np.full((40 + 56 * bright, 30, 3), 20, np.uint8)
        picture[..., colour] = 255 if bright else 120
        return Sample([picture], [("<image>" + turns[0][0], turns[0][1]), *turns[1:]])


def tiny_config(recipe: str, output_dir: Path, **overrides: object) -> TrainConfig:
    """The recipe at a tiny size; `overrides` are dotted names with __ for the dot."""
    values = {
        "output_dir": str(output_dir),
        "model.preset": "tiny",
        "model.options": MODEL_OPTIONS,
        "model.allow_random_frozen": True,
        "image.window_size": 28 if recipe == "PT" else 56,
        "data.prompt": "plain",
        "data.sequence_length": 32,
        "optimizer.lr_peak": 1e-2,
        "optimizer.lr_min": 1e-3,
        "schedule.steps": 3,
        "schedule.warmup_steps": 1,
        "parallel.global_batch_size": 8,
        "parallel.gradient_accumulation_steps": 1,
        "parallel.precision": "fp32",
        "parallel.zero_stage": 2,
    }
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return override(RECIPES[recipe](), values | dotted)


def tiny_model(seed: int = 7) -> InfiMMHD:
    """A model with open gates, so that every part has a gradient from the first step."""
    torch.manual_seed(seed)
    values = preset("tiny").to_dict()
    for part, options in MODEL_OPTIONS.items():
        values[part] |= options
    model = InfiMMHD(InfiMMHDConfig.from_dict(values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    return model


def messages(*texts: str) -> list[dict]:
    """LLaVA messages, human and gpt in turn."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def write_conversations(folder: Path, number: int) -> Path:
    """A LLaVA file of `number` good records with their JPEGs; every fourth has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(number):
        if i % 4 == 3:
            records.append({"conversations": messages("which colour ?", "red", "how bright ?", "light red")})
            continue
        pixels = np.full((30, 40, 3), 30, np.uint8)
        pixels[..., i % 3] = 250
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        conversation = messages("<image>\nwhich colour ?", COLOURS[i % 3])
        records.append({"image": f"{i}.jpg", "conversations": conversation})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_mixed_conversations(
    folder: Path, samples: Sequence[int | None], *, seed: int = 0, sides: Sequence[int] = (28, 56)
) -> Path:
    """A LLaVA file with a record for each entry of `samples`: its number of images, or None for a bad record
    (a missing or corrupt image, an empty answer, no JSON). Sides of images are drawn from `sides` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    lines = []
    for number, num_images in enumerate(samples):
        names = [f"{number}-{i}.png" for i in range(num_images or 1)]
        for name in names:
            pixels = np.full((draw.choice(sides), draw.choice(sides), 3), 30, np.uint8)
            pixels[..., draw.randrange(3)] = draw.choice((120, 250))
            Image.fromarray(pixels).save(folder / name)
        turns = [("<image>" * len(names if num_images != 0 else []) + "which colour ?", draw.choice(COLOURS))]
        if draw.random() < 0.5:
            turns.append(("how bright ?", draw.choice(("dark", "light red"))))
        record = {"image": names, "conversations": messages(*(text for turn in turns for text in turn))}
        if num_images == 0:
            del record["image"]
        line = json.dumps(record)
        if num_images is None:
            line = _spoilt(record, folder / names[0], draw.randrange(4))
        lines.append(line + "\n")
    path = folder / "records.jsonl"
    path.write_text("".join(lines))
    return path


def _spoilt(record: dict, image: Path, how: int) -> str:
    if how == 0:
        image.unlink()
    elif how == 1:
        image.write_bytes(image.read_bytes()[:40])
    elif how == 2:
        record["conversations"][1]["value"] = " "
    text = json.dumps(record)
    return text[:-9] if how == 3 else text


def write_start(folder: Path) -> dict[str, object]:
    """A model with open gates and its tokenizer, as overrides of `tiny_config` that start from them."""
    tiny_model().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "tokenizer")
    return {"init_from": str(folder), "data__tokenizer": str(folder / "tokenizer")}
