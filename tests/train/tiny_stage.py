"""Words, pictures and configs of a size that trains in milliseconds."""

import json
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
    "vision": {"hidden_size": 32, "num_layers": 2, "num_heads": 1, "intermediate_size": 64},
    "gated_cross_attention": {"num_heads": 2, "head_dim": 16},
    "language": {
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
            return Sample(None, turns)
        picture = np.full((40 + 56 * bright, 30, 3), 20, np.uint8)
        picture[..., colour] = 255 if bright else 120
        return Sample(picture, turns)


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


def log_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return InfiMMHD.from_pretrained(output_dir / "model").state_dict()


def assert_weights_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
