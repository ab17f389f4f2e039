"""A tiny saved model that reads any text, and every set in its published form, small."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model import InfiMMHD, InfiMMHDConfig, InfiMMHDProcessor, preset

SPECIAL = ("<pad>", "<bos>", "<image>", "<|endofchunk|>")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every printable character of ASCII, space, tab and newline."""
    alphabet = [*map(chr, range(33, 127)), "\u0120", "\u0109", "\u010a"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIAL, *alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|endofchunk|>",
        additional_special_tokens=["<image>"],
    )


def save_model(folder: Path, **text: int) -> Path:
    """Windows of 28 pixels, one to nine an image and a thumbnail; answers are noise, but each its own."""
    config = preset("tiny")
    config.vision_config.num_layers = 2
    config.text_config.initializer_range = 0.3
    sizes = {"vocab_size": 104, "max_position_embeddings": 640, "num_hidden_layers": 2} | text
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    config.image.mode = "dynamic"
    config = InfiMMHDConfig.from_dict(config.to_dict())  # its limits are checked
    torch.manual_seed(1)
    model = InfiMMHD(config)
    for block in model.gated_blocks.values():
        torch.nn.init.normal_(block.attn_gate)
        torch.nn.init.normal_(block.ffn_gate)
    model.save_pretrained(folder)
    InfiMMHDProcessor.for_model(config, byte_tokenizer(), "plain").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("vqa") / "model")


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
