"""The demo's tokenizer covers its own questions and answers and refuses everything else."""

import pytest

from model import preset
from train.demo.painted import PaintedPhotographs
from train.demo.vocabulary import build_tokenizer


def test_special_tokens_have_the_ids_of_the_tiny_preset():
    tokenizer, config = build_tokenizer(), preset("tiny")
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    assert tokenizer.eos_token_id == config.end_of_chunk_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    assert len(tokenizer) <= config.text_config.vocab_size


def test_every_question_and_answer_survives_encoding():
    tokenizer, dataset = build_tokenizer(), PaintedPhotographs()
    for i in range(20):
        for question, answer in dataset[i].turns:
            assert tokenizer.decode(tokenizer(question).input_ids) == question
            assert tokenizer.decode(tokenizer(answer).input_ids) == answer


def test_an_unknown_word_raises():
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer()("which letters")
