"""Carries a source's tokenizer along, with the two tokens that the model adds."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from ..checks import require
from ..config import InfiMMHDConfig
from ..processing import InfiMMHDProcessor
from .report import Report

END_OF_CHUNK, IMAGE = "<|endofchunk|>", "<image>"
_ONE_OF = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_FILES = (
    *_ONE_OF,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def copy_tokenizer(source: Path, target: Path, report: Report) -> None:
    """The tokenizer's files as they are."""
    if _without_tokenizer(source, report):
        return
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    report.notes.append(f"tokenizer: copied from {source}")


def carry_tokenizer(source: Path, target: Path, config: InfiMMHDConfig, report: Report) -> None:
    """The tokenizer with `<|endofchunk|>` and `<image>` at the ids that the config has for them."""
    if _without_tokenizer(source, report):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # the readers of its many file formats raise what they like
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"tokenizer must be a folder with a saved tokenizer, got {str(source)!r}: {reason}"
        ) from error
    wanted = {END_OF_CHUNK: config.end_of_chunk_token_id, IMAGE: config.image_token_id}
    known = tokenizer.get_vocab()
    absent = sorted((token for token in wanted if token not in known), key=wanted.__getitem__)
    if not absent:
        copy_tokenizer(source, target, report)
    for token in absent:
        tokenizer.add_tokens([token], special_tokens=True)
    for token, number in wanted.items():
        rule = f"give {token} the id {number} of the model's vocabulary"
        given = tokenizer.convert_tokens_to_ids(token)
        require(given == number, "tokenizer", rule, given)
    vocab_size = config.text_config.vocab_size
    require(len(tokenizer) <= vocab_size, "tokenizer", f"have at most {vocab_size} tokens", len(tokenizer))
    if absent:
        tokenizer.save_pretrained(target)
        added = ", ".join(f"{token} {wanted[token]}" for token in absent)
        report.notes.append(f"tokenizer: from {source}, with {added} added")
    InfiMMHDProcessor.for_model(config, tokenizer).save_pretrained(target)
    report.notes.append("processor: written, with the chat template of Vicuna v1")


def _without_tokenizer(source: Path, report: Report) -> bool:
    if any((source / name).is_file() for name in _ONE_OF):
        return False
    report.notes.append(f"tokenizer: none in {source}, none written")
    return True
