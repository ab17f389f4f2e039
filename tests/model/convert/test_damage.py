"""What is wrong with a checkpoint is a ValueError that names file and tensor, and nothing is written."""

import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import InfiMMHD, preset
from model.convert import convert
from tests.model.convert.conftest import tensors_in, write_shards

CLS = "vision.cls_token"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    InfiMMHD(preset("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(saved, tmp_path):
    folder = tmp_path / "sharded"
    write_shards(folder, load_file(saved / "model.safetensors"))
    (folder / "config.json").write_text((saved / "config.json").read_text())
    return folder


def refused(source, message: str, **options) -> None:
    destination = source.parent / "out"
    before = sorted(source.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(source, destination, **options)
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(CLS), rf"exactly the tensors of infimm-hd weights, got '.*' with 1 missing: {CLS}$"),
        (lambda w: w.update(extra=torch.ones(1)), "1 unexpected: extra in '?.*model.safetensors"),
        (lambda w: w.update({CLS: torch.zeros(3)}), rf"{CLS} in '.*' must have shape \[112\], got \[3\]"),
        (lambda w: w.update({CLS: torch.zeros(112).long()}), f"{CLS} in '.*' must be floating .*, got 'I64'"),
        (lambda w: w[CLS].fill_(torch.nan), f"{CLS} in '.*model.safetensors' must be finite, got 'NaN or"),
        (
            lambda w: w.update({"language.lm_head.weight": torch.zeros(60, 128)}),
            r"language.lm_head.weight in '.*' must have shape \[64, 128\], got \[60, 128\]",
        ),
    ],
)
def test_tensors_that_are_not_the_models(saved, tmp_path, change, message):
    folder = tmp_path / "in"
    folder.mkdir()
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((saved / "config.json").read_text())
    refused(folder, message)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b"x" * 500])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_damaged_file(saved, tmp_path, damage, suffix):
    folder = tmp_path / "in"
    folder.mkdir()
    weights = load_file(saved / "model.safetensors")
    path = folder / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    path.write_bytes(damage(path.read_bytes()))
    (folder / "config.json").write_text((saved / "config.json").read_text())
    refused(folder, f"SRC must hold undamaged weight files, got '.*{path.name}'")


class _Code:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, capsys):
    path = tmp_path / "weights.bin"
    with open(path, "wb") as file:
        pickle.dump({"weight": _Code()}, file)
    torch.save({"weight": _Code()}, tmp_path / "weights.pt")
    for name in ("weights.bin", "weights.pt"):
        with pytest.raises(ValueError, match=f"undamaged weight files, got '.*{name}'") as caught:
            convert(tmp_path / name, tmp_path / "out")
        assert "weights_only" not in str(caught.value) and "run" not in capsys.readouterr().out


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "SRC must hold all shards of its checkpoint, got .*model-00002-of-00003.safetensors")
    (sharded / "model.safetensors.index.json").unlink()  # and without the index that knows of it
    refused(sharded, "SRC must hold all shards of its checkpoint, got .*model-00002-of-00003.safetensors")


def test_shards_without_an_index_are_read_when_all_are_there(sharded, tmp_path):
    (sharded / "model.safetensors.index.json").unlink()
    convert(sharded, tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == tensors_in(sharded).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: index["weight_map"].pop(CLS),
            f"list {CLS} of '.*' in its index, got 'an index without",
        ),
        (
            lambda index: index["weight_map"].update(extra=index["weight_map"][CLS]),
            "hold extra in '.*', as its",
        ),
        (lambda index: index.pop("weight_map"), "index.json': no index with a weight_map"),
        (
            lambda index: index["weight_map"].update({CLS: "../other.safetensors"}),
            "name files of its own folder",
        ),
    ],
)
def test_an_index_that_does_not_fit(sharded, change, message):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    refused(sharded, message)


def test_torch_shards_with_an_index_are_read(saved, tmp_path):
    folder, weights = tmp_path / "in", load_file(saved / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    weight_map = {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05}-of-00002.bin"
        part = {name: weights[name] for name in list(weights)[number::2]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in (folder, folder / "pytorch_model.bin.index.json"):
        convert(source, tmp_path / f"out-{source.name}")
        written = tensors_in(tmp_path / f"out-{source.name}")
        assert all(torch.equal(written[name], weight) for name, weight in weights.items())
    refused(folder / file, "SRC must name the folder of a sharded checkpoint, got one shard")
    (folder / file).unlink()
    refused(folder, f"SRC must hold all shards of its checkpoint, got .*{file}")


def test_half_an_index(sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text()[:200])
    refused(sharded, "undamaged weight files, got '.*index.json': no index")


def test_a_tensor_in_two_shards(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    path = sharded / "model-00002-of-00003.safetensors"
    save_file(load_file(path) | {CLS: torch.zeros(112)}, path)
    refused(sharded, f"{CLS} in '.*' must be stored once")


def test_sources_that_are_none(saved, tmp_path):
    refused(tmp_path / "nothing", "SRC must be an existing file or folder, got '.*nothing'")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "SRC must be a folder with weights")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(
        tmp_path / "other.safetensors", "SRC must hold weights of a known form, one of infimm-hd .* with a$"
    )
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "list.pt' must hold a state dict .*, got 'list'")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    refused(tmp_path / "numbers.pt", "a in '.*numbers.pt' must be a tensor, got 'int'")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"a": torch.ones(2)}, tmp_path / "two" / f"{name}.safetensors")
    refused(tmp_path / "two", "SRC must name one of the weight files in .* with a.safetensors, b.safetensors")


def test_a_destination_with_something_in_it(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("keep")
    for path in (tmp_path / "full", tmp_path / "full" / "note", saved):
        with pytest.raises(ValueError, match="DST must be a new or an empty folder"):
            convert(saved, path)
    (tmp_path / "empty").mkdir()
    convert(saved, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("size", ["", "0", "-5", "5 apples", "GB", "1e3"])
def test_shard_sizes_that_are_none(saved, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of bytes"):
        convert(saved, tmp_path / "out", max_shard_size=size)


def test_shards_are_as_large_as_allowed(saved, tmp_path):
    convert(saved, tmp_path / "out", max_shard_size="1MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and {path.name for path in files} == set(index["weight_map"].values())
    for path in files:
        weights = load_file(path)
        assert sum(weight.nbytes for weight in weights.values()) <= 1_000_000
        assert all(index["weight_map"][name] == path.name for name in weights)
    expected = load_file(saved / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    loaded = InfiMMHD.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(saved, tmp_path, dtype):
    convert(saved, tmp_path / "out", dtype=dtype)
    expected = load_file(saved / "model.safetensors")
    for name, weight in tensors_in(tmp_path / "out").items():
        assert torch.equal(weight, expected[name].to(getattr(torch, dtype))), name
    assert InfiMMHD.from_pretrained(tmp_path / "out").config.dtype == getattr(torch, dtype)
    again = convert(tmp_path / "out", tmp_path / "again", dtype="auto")
    assert {weight.dtype for weight in tensors_in(tmp_path / "again").values()} == {getattr(torch, dtype)}
    assert not again.changed


def test_others_may_read_what_the_umask_lets_them(saved, tmp_path):
    """safetensors' files and a temporary folder are for their owner alone."""
    before = os.umask(0o027)
    try:
        convert(saved, tmp_path / "out", max_shard_size="3MB")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_values_that_half_precision_cannot_hold(saved, tmp_path):
    folder = tmp_path / "in"
    write_shards(folder, load_file(saved / "model.safetensors") | {CLS: torch.full((112,), 1e6)})
    (folder / "config.json").write_text((saved / "config.json").read_text())
    refused(folder, f"--dtype must be wide enough for {CLS}, got 'float16'", dtype="float16")


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(saved, tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("model.convert.shards.save_file", no_room)
    with pytest.raises(OSError, match="DST must have room for .* No space left on device"):
        convert(saved, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_torch_tensors_with_one_storage_are_written_apart(saved, tmp_path):
    weights = load_file(saved / "model.safetensors")
    weights["language.lm_head.weight"] = weights["language.model.embed_tokens.weight"]
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text((saved / "config.json").read_text())
    convert(folder, tmp_path / "out")
    written = tensors_in(tmp_path / "out")
    assert torch.equal(written["language.lm_head.weight"], written["language.model.embed_tokens.weight"])


def test_the_torch_format_before_1_6_is_read(saved, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    weights = load_file(saved / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "config.json").write_text((saved / "config.json").read_text())
    convert(folder, tmp_path / "out")
    written = tensors_in(tmp_path / "out")
    assert all(torch.equal(weight, written[name]) for name, weight in weights.items())
