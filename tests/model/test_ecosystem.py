"""The model as other libraries meet it: Auto classes, copies, dtypes, strict loading."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from model import InfiMMHD, InfiMMHDConfig, InfiMMHDProcessor, preset
from tests.model.conftest import IMAGE, batch_of
from train.demo.vocabulary import build_tokenizer


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    InfiMMHDProcessor.for_model(model.config, build_tokenizer(), "plain").save_pretrained(tmp_path)
    return tmp_path


def test_auto_classes_find_the_model(model, saved):
    batch = batch_of([[1, IMAGE, 5]], [[2]])
    expected = model(**batch).logits
    for auto in (AutoModel, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(saved)
        assert type(loaded) is InfiMMHD and torch.equal(loaded(**batch).logits, expected)
    assert AutoConfig.from_pretrained(saved) == model.config
    assert type(AutoProcessor.from_pretrained(saved)) is InfiMMHDProcessor
    assert type(AutoModel.from_config(preset("tiny"))) is InfiMMHD


def test_a_fresh_process_needs_only_the_import(saved):
    code = (
        "import model\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"loaded = AutoModelForImageTextToText.from_pretrained({str(saved)!r})\n"
        f"inputs = AutoProcessor.from_pretrained({str(saved)!r})(text='left characters ?')\n"
        "print(loaded.generate(**inputs, max_new_tokens=2).shape[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_the_dtype_of_loading_is_the_callers(model, saved):
    assert AutoModel.from_pretrained(saved, dtype=torch.bfloat16).dtype == torch.bfloat16
    half = InfiMMHD.from_pretrained(saved, dtype=torch.bfloat16)
    half.save_pretrained(saved)
    assert {p.dtype for p in InfiMMHD.from_pretrained(saved).parameters()} == {torch.bfloat16}


def test_one_dtype_whatever_the_language_models_config_says():
    """transformers made the language model in its config's own dtype, and the model came out mixed."""
    values = preset("tiny").to_dict()
    values["text_config"]["dtype"] = "bfloat16"
    model = InfiMMHD(InfiMMHDConfig.from_dict(values))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sharded_saving_round_trips(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded, info = InfiMMHD.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_folder_of_another_model_is_refused(model, saved):
    """transformers would warn, and hand over a model with random weights."""
    other = preset("tiny")
    other.vision_config.num_layers = 5
    with pytest.raises(
        ValueError, match="directory must hold every weight of its config.json, got .*blocks.4"
    ):
        InfiMMHD.from_pretrained(saved, config=InfiMMHDConfig.from_dict(other.to_dict()))
    (saved / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match="path must hold a model's config, .* model_type must be 'infimm_hd'"
    ):
        InfiMMHD.from_pretrained(saved)


def test_it_is_a_transformers_model_that_can_be_copied(model):
    assert isinstance(model, PreTrainedModel) and model.can_generate()
    assert model.get_input_embeddings() is model.language.model.embed_tokens
    assert model.get_output_embeddings() is model.language.lm_head
    batch = batch_of([[1, IMAGE, 5]], [[2]])
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected) and other.config == model.config
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], expected)


def test_gradient_checkpointing_is_switched_as_in_transformers(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.gradient_checkpointing and model.vision.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing and not model.vision.gradient_checkpointing
    with pytest.raises(
        ValueError, match="gradient_checkpointing_kwargs must be None or .*use_reentrant': True"
    ):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_a_cache_of_fixed_length_generates_the_same(model):
    batch = batch_of([[1, IMAGE, 5], [1, 7, IMAGE]], [[2], [1]])
    expected = model.generate(**batch, max_new_tokens=5)
    assert torch.equal(model.generate(**batch, max_new_tokens=5, cache_implementation="static"), expected)


def test_a_config_equals_itself_and_nothing_else():
    config = preset("tiny")
    assert config == preset("tiny") and config != preset("infimm_hd_7b") and config != 3
    changed = copy.deepcopy(config)
    changed.text_config.rope_parameters["rope_theta"] = 5.0
    assert config != changed
    assert "vision_config" in str(config)
