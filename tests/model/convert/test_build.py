"""A start for training made of released parts, and language models in and out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from model import InfiMMHD, InfiMMHDConfig, InfiMMHDProcessor, preset
from model.convert import build, convert
from tests.model.convert.conftest import clip_config, random_weights, tensors_in

VOCABULARY = 40
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def target_config(vocab_size: int = VOCABULARY + 2, **text) -> InfiMMHDConfig:
    """What is built: CLIP's ViT and a language model, whose last two tokens are the model's own."""
    config = preset("tiny").to_dict()
    return InfiMMHDConfig.from_dict(
        config
        | dict(
            vision_config=clip_config(),
            text_config=TEXT | dict(model_type="llama", vocab_size=vocab_size) | text,
            end_of_chunk_token_id=vocab_size - 2,
            image_token_id=vocab_size - 1,
        )
    )


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    random_weights(CLIPVisionModel(config)).save_pretrained(folder)
    return folder


def language_folder(folder, family="llama", **text):
    model = random_weights(AutoModelForCausalLM.from_config(FAMILIES[family](**(TEXT | text))))
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder, words: int = VOCABULARY) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_language_models_give_their_own_logits_bit_for_bit(family, tied, clip_folder, tmp_path):
    source = language_folder(tmp_path / "llm", family, tie_word_embeddings=tied)
    config = target_config(model_type=family, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    build(tmp_path / "start", preset=config, vision=clip_folder, language=tmp_path / "llm")
    model = InfiMMHD.from_pretrained(tmp_path / "start").eval()
    assert model.config.text_config.model_type == family
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        assert torch.equal(model.language(ids).logits, source(ids).logits)

    convert(tmp_path / "start", tmp_path / "back", target="transformers-llama")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(source)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, source(ids).logits)


def test_a_smaller_vocabulary_grows_by_the_mean(clip_folder, tmp_path):
    source = language_folder(tmp_path / "llm")
    save_tokenizer(tmp_path / "llm")
    reports = build(
        tmp_path / "start", preset=target_config(), vision=clip_folder, language=tmp_path / "llm", seed=3
    )
    grown = (
        "grown: language.model.embed_tokens.weight, from 40 to 42 rows, the new ones the mean of the others"
    )
    assert grown in reports[1].text()
    model = InfiMMHD.from_pretrained(tmp_path / "start").eval()
    for new, old in (
        (model.language.model.embed_tokens.weight, source.model.embed_tokens.weight),
        (model.language.lm_head.weight, source.lm_head.weight),
    ):
        assert torch.equal(new[:VOCABULARY], old)
        torch.testing.assert_close(new[VOCABULARY:], old.mean(0).expand(2, -1))
    ids = torch.randint(0, VOCABULARY, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(model.language(ids).logits[..., :VOCABULARY], source(ids).logits)
    processor = InfiMMHDProcessor.from_pretrained(tmp_path / "start")
    assert (
        processor.image_processor.window_size
        == InfiMMHDConfig.load(tmp_path / "start" / "config.json").vision_config.input_size
    )
    assert processor.apply_chat_template([{"role": "user", "content": "word5"}]).endswith("USER: word5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "start")
    assert tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"]) == [VOCABULARY, VOCABULARY + 1]
    assert tokenizer("word5<image>").input_ids == [5, VOCABULARY + 1]
    assert "<|endofchunk|> 40, <image> 41 added" in reports[2].text()
    assert model.generation_config.suppress_tokens == [VOCABULARY + 1]


def test_the_new_parts_are_the_models_own_and_seeded(clip_folder, tmp_path):
    language_folder(tmp_path / "llm")
    parts = dict(preset=target_config(), vision=clip_folder, language=tmp_path / "llm")
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        state = torch.get_rng_state()
        build(tmp_path / name, seed=seed, **parts)
        assert torch.equal(torch.get_rng_state(), state)
        found[name] = tensors_in(tmp_path / name)
    new = [name for name in found["a"] if not name.startswith(("vision.", "language."))]
    assert all(torch.equal(found["a"][name], found["b"][name]) for name in found["a"])
    for name in ("vision_keys_values.weight", "gated_blocks.0.q_proj.weight", "connector.linear_in.weight"):
        assert name in new and not torch.equal(found["a"][name], found["c"][name])
    first, second = found["a"]["gated_blocks.0.q_proj.weight"], found["a"]["gated_blocks.1.q_proj.weight"]
    assert not torch.equal(first, second)
    model = InfiMMHD.from_pretrained(tmp_path / "a").eval()
    assert all(not block.attn_gate.any() for block in model.gated_blocks.values())
    ids, pixels = torch.tensor([[5, VOCABULARY + 1, 6]]), torch.randn(1, 3, 56, 56)
    positions = torch.tensor([[-1, -1]])
    with torch.no_grad():
        out = model(ids, None, None, pixels, positions, [1], [1]).logits
    torch.testing.assert_close(out, model.language(ids).logits)  # closed gates: the language model alone


@pytest.mark.parametrize(("window_size", "rows"), [(None, 1 + 6**2), (28, 1 + 2**2)])
def test_windows_are_the_presets_unless_told(window_size, rows, clip_folder, tmp_path):
    language_folder(tmp_path / "llm")
    config = target_config()
    config.vision_config.window_size = 84
    parts = dict(vision=clip_folder, language=tmp_path / "llm", window_size=window_size)
    reports = build(tmp_path / "start", preset=config, **parts)
    model = InfiMMHD.from_pretrained(tmp_path / "start")
    assert len(model.vision.position_table) == rows and "interpolated" in reports[0].text()


def test_parts_of_whole_models_are_taken(tmp_path):
    model = random_weights(InfiMMHD(preset("tiny")))
    model.save_pretrained(tmp_path / "own")
    config = preset("tiny")
    config.vision_config.feature_layer = -2
    reports = build(tmp_path / "start", preset=config, vision=tmp_path / "own", language=tmp_path / "own")
    assert reports[0].left_out["language.lm_head.weight"] == "only the vision part is taken"
    start = InfiMMHD.from_pretrained(tmp_path / "start")
    assert start.config.vision_config.feature_layer == -2
    for name, weight in model.state_dict().items():
        if name.startswith(("vision.", "language.")):
            assert torch.equal(start.state_dict()[name], weight), name
    assert not start.state_dict()["gated_blocks.0.attn_gate"].any()


def test_concatenation_gets_its_projector(clip_folder, tmp_path):
    language_folder(tmp_path / "llm")
    config = target_config()
    config.fusion, config.connector.kind, config.position = "concatenation", "mlp", "none"
    reports = build(tmp_path / "start", preset=config, vision=clip_folder, language=tmp_path / "llm")
    assert all(name.startswith("connector.") for name in reports[2].new)
    assert InfiMMHD.from_pretrained(tmp_path / "start").config.fusion == "concatenation"


def test_sizes_other_than_the_presets_are_refused(clip_folder, tmp_path):
    language_folder(tmp_path / "llm", num_hidden_layers=1)
    parts = dict(vision=clip_folder, language=tmp_path / "llm")
    with pytest.raises(ValueError, match="--preset must .* got text_config.num_hidden_layers 2 for 1"):
        build(tmp_path / "start", preset=target_config(), **parts)
    config = target_config()
    config.vision_config.intermediate_size = 128
    with pytest.raises(ValueError, match="--preset must .* got vision_config.intermediate_size 128 for 64"):
        build(tmp_path / "start", preset=config, **parts)
    assert not (tmp_path / "start").exists()


def test_a_larger_vocabulary_is_refused(clip_folder, tmp_path):
    language_folder(tmp_path / "llm", vocab_size=50)
    message = "at most the 42 tokens .* in language.model.embed_tokens.weight, got 50"
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "start", preset=target_config(), vision=clip_folder, language=tmp_path / "llm")


def test_a_vocabulary_that_the_config_does_not_have_is_refused(clip_folder, tmp_path):
    language_folder(tmp_path / "llm")
    path = tmp_path / "llm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 41}))
    with pytest.raises(ValueError, match=r"config.json' must .* got vocab_size 41 for 40"):
        build(tmp_path / "start", preset=target_config(), vision=clip_folder, language=tmp_path / "llm")


def test_a_tokenizer_that_gives_other_ids_is_refused(clip_folder, tmp_path):
    language_folder(tmp_path / "llm")
    save_tokenizer(tmp_path / "tokenizer", VOCABULARY + 1)
    parts = dict(vision=clip_folder, language=tmp_path / "llm", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match=r"give <\|endofchunk\|> the id 40 of the model's vocabulary, got 41"
    ):
        build(tmp_path / "start", preset=target_config(), **parts)
    assert not (tmp_path / "start").exists()


def test_a_stored_output_that_is_tied_is_a_second_name(clip_folder, tmp_path):
    language_folder(tmp_path / "llm", tie_word_embeddings=True)
    path = tmp_path / "llm" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    config = target_config(vocab_size=VOCABULARY, tie_word_embeddings=True)
    reports = build(tmp_path / "start", preset=config, vision=clip_folder, language=tmp_path / "llm")
    assert reports[1].aliases == ["lm_head.weight"]
    assert "language.lm_head.weight" not in tensors_in(tmp_path / "start")


def test_parts_in_other_types_load_in_one(clip_folder, tmp_path):
    """The text config kept its own dtype, and the language model was made in it beside a float32 ViT."""
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).bfloat16().save_pretrained(tmp_path / "llm")
    assert json.loads((tmp_path / "llm" / "config.json").read_text())["dtype"] == "bfloat16"
    build(tmp_path / "start", preset=target_config(), vision=clip_folder, language=tmp_path / "llm")
    stored = tensors_in(tmp_path / "start")
    assert stored["language.lm_head.weight"].dtype == torch.bfloat16
    assert stored["vision.cls_token"].dtype == torch.float32
    model = InfiMMHD.from_pretrained(tmp_path / "start")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    fresh = InfiMMHD(InfiMMHDConfig.load(tmp_path / "start" / "config.json"))
    assert {weight.dtype for weight in fresh.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"model_type": "gpt2"}]
)
def test_a_language_models_config_that_cannot_be_used(values, clip_folder, tmp_path):
    language_folder(tmp_path / "llm")
    path = tmp_path / "llm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match="SRC must have a (usable config file|config.json of model_type)"):
        build(tmp_path / "start", preset=target_config(), vision=clip_folder, language=tmp_path / "llm")


def test_converting_a_model_keeps_its_tokenizer(tmp_path):
    InfiMMHD(preset("tiny")).save_pretrained(tmp_path / "own")
    save_tokenizer(tmp_path / "own")
    for target in ("infimm-hd", "infimm-stage1", "transformers-llama", "timm"):
        out = tmp_path / target
        if target == "infimm-stage1":
            config = preset("tiny")
            config.connector.kind = "none"
            InfiMMHD(config).save_pretrained(tmp_path / "plain")
            save_tokenizer(tmp_path / "plain")
            convert(tmp_path / "plain", out, target=target)
        else:
            convert(tmp_path / "own", out, target=target)
        kept = [path.name for path in out.iterdir() if "token" in path.name]
        assert sorted(kept) == ([] if target == "timm" else ["tokenizer.json", "tokenizer_config.json"])
        for name in kept:
            assert (out / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_tied_weights_that_differ_are_refused(clip_folder, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "llm", state_dict=random_weights(model).state_dict())
    config = target_config(vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="lm_head.weight in .* must equal model.embed_tokens.weight"):
        build(tmp_path / "start", preset=config, vision=clip_folder, language=tmp_path / "llm")
