"""The decoder loop against transformers' own models of the Llama family, bit for bit at closed gates."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import InfiMMHD, InfiMMHDConfig, preset
from tests.model.conftest import IMAGE, batch_of

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=3,
)
FAMILIES = {
    "llama": dict(model_type="llama"),
    "mistral": dict(model_type="mistral", sliding_window=4),
    "mistral without a window": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": dict(model_type="qwen3"),
    "llama with scaled positions": dict(
        model_type="llama", rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    ),
}


def with_language(family: str) -> InfiMMHD:
    torch.manual_seed(0)
    values = preset("tiny").to_dict()
    options = SMALL | FAMILIES[family]
    if options["model_type"] == "qwen2":  # it derives the size of a head
        options.pop("head_dim")
    values["text_config"] = options
    return InfiMMHD(InfiMMHDConfig.from_dict(values)).eval()


ROWS = [[1, 10, IMAGE, 11, 12, 13, 14, 15, 16], [1, 20, 21, IMAGE, 22]]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_closed_gates_the_logits_are_the_bare_models(family):
    model = with_language(family)
    batch = batch_of(ROWS, [[2], [1]])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours, bare = model(**batch).logits, model.language(**text).logits
    assert torch.equal(ours[text["attention_mask"]], bare[text["attention_mask"]])
    assert type(model.language).__module__.split(".")[-2] == FAMILIES[family]["model_type"]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_closed_gates_is_the_bare_models(family):
    """Caches of sliding windows, position ids and masks are the family's own."""
    model = with_language(family)
    batch = batch_of([[1, 10, IMAGE, 11, 12, 13, 14]], [[2]])
    ours = model.generate(**batch, max_new_tokens=12)
    bare = model.language.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        generation_config=model.generation_config,
        max_new_tokens=12,
    )
    assert torch.equal(ours, bare)


def test_a_local_model_of_the_family_is_loaded_into_the_language_part(tmp_path):
    torch.manual_seed(1)
    config = InfiMMHDConfig.from_dict(
        preset("tiny").to_dict() | dict(text_config=SMALL | FAMILIES["mistral"])
    )
    bare = AutoModelForCausalLM.from_config(config.text_config).eval()
    bare.save_pretrained(tmp_path)
    model = InfiMMHD(config)
    model.language.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    ids = torch.tensor([[1, 7, 9, 11]])
    assert torch.equal(model(ids).logits, bare(ids).logits)


def test_a_family_that_the_loop_does_not_know_is_refused():
    values = preset("tiny").to_dict() | dict(text_config=dict(model_type="gpt2"))
    with pytest.raises(ValueError, match="text_config.model_type must be one of 'llama', .*, got 'gpt2'"):
        InfiMMHDConfig.from_dict(values)


def test_the_embedding_table_can_grow():
    """transformers' `resize_token_embeddings`, for an LLM that gets `<image>` and an end token."""
    model = with_language("llama")
    ids = torch.tensor([[1, 7, 9]])
    before = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.config.text_config.vocab_size == 70
    assert torch.equal(model(ids).logits[..., :64], before)
