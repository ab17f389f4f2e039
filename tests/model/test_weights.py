"""`from_pretrained` on folders that do not hold the model: always a ValueError that names the folder."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import InfiMMHD, InfiMMHDConfig, preset
from tests.model.conftest import batch_of

CLS = "vision.cls_token"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    InfiMMHD(preset("tiny")).save_pretrained(folder)
    return folder


def changed(saved, folder, change):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((saved / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(CLS), f"every weight of its config.json, got .* without {CLS}$"),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("vision.blocks.0")],
            "every .* without vision.blocks.0.attn.out_proj.bias, .*, .* and 10 more",
        ),
        (
            lambda w: w.update(extra=torch.zeros(1)),
            "no other weight than .*, got .* with extra \\(model.safetensors\\)$",
        ),
        (
            lambda w: w.update({CLS: torch.zeros(3)}),
            rf"weights of the shapes .* with {CLS} \[3\] for \[112\] \(model.safetensors\)$",
        ),
        (
            lambda w: w.update({CLS: torch.zeros(112).long()}),
            rf"floating weights, got .* with {CLS} I64 \(model.safetensors\)$",
        ),
        (lambda w: w[CLS].fill_(torch.nan), f"finite weights, got .* with NaN or infinity in {CLS}"),
    ],
)
def test_weights_that_are_not_the_models_are_named(saved, tmp_path, change, message):
    """torch's RuntimeError names no folder; NaN and integer weights were loaded in silence."""
    changed(saved, tmp_path, change)
    with pytest.raises(ValueError, match=f"directory must hold {message}") as caught:
        InfiMMHD.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b"x" * 500])
def test_a_damaged_file_is_named_without_advice_to_read_pickles(saved, tmp_path, damage):
    """The loader's own message suggested safe=False, which runs code from the folder."""
    changed(saved, tmp_path, lambda weights: None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = "directory must hold undamaged safetensors, got .*model.safetensors"
    with pytest.raises(ValueError, match=message) as caught:
        InfiMMHD.from_pretrained(tmp_path)
    assert "safe=" not in str(caught.value)


def test_a_folder_without_weights_is_named(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="directory must hold every weight .* and .* more"):
        InfiMMHD.from_pretrained(tmp_path)


def test_shards_and_other_floating_types_are_read(saved, tmp_path):
    model = InfiMMHD.from_pretrained(saved).bfloat16()
    half = model.state_dict()
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for name, weight in InfiMMHD.from_pretrained(tmp_path).state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, half[name]), name
    for name, weight in InfiMMHD.from_pretrained(tmp_path, dtype=torch.float32).state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, half[name].float()), name
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    message = rf"every file of its index, got .* without '{shard.name}' \(with \S+\)$"
    with pytest.raises(ValueError, match=message):
        InfiMMHD.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="readable index of its shards, got .*index.json"):
        InfiMMHD.from_pretrained(tmp_path)


def test_tied_embeddings_survive_saving(tmp_path):
    """safetensors stores the shared matrix once, and the strict loader missed the other name."""
    values = preset("tiny").to_dict()
    values["text_config"]["tie_word_embeddings"] = True
    model = InfiMMHD(InfiMMHDConfig.from_dict(values)).eval()
    model.save_pretrained(tmp_path)
    loaded = InfiMMHD.from_pretrained(tmp_path).eval()
    assert loaded.language.lm_head.weight is loaded.language.model.embed_tokens.weight
    batch = batch_of([[1, 5, 6]], [[]])
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
