"""Shards: every key once, the same as the `webdataset` library reads; damage named, never lost."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from model import ImageProcessor
from train.config import DataConfig
from train.data import BadSample, build_dataset, tar_index
from train.data.shards import WebDataset, expand


def jpeg(shade: int, size: tuple[int, int] = (20, 12), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards of four keys, as the library writes them."""
    pattern = f"{tmp_path}/part-%03d.tar"
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(12):
            sample = {"__key__": f"{i:05d}", "jpg": jpeg(i * 9), "txt": f"caption é {i}"}
            writer.write(sample | {"json": {"caption": f"json {i}", "alt": f"alt {i}", "width": 20}})
    return f"{tmp_path}/part-{{000..002}}.tar"


def bytes_of(sample) -> bytes:
    return sample.images[0].read()


def test_shards_read_as_the_library_reads_them(shards):
    dataset = build_dataset(DataConfig(name="webdataset", path=shards))
    expected = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(dataset) == len(expected) == 12 and dataset.notes == []
    for i, record in enumerate(expected):
        sample = dataset[i]
        assert bytes_of(sample) == record["jpg"]
        assert sample.turns == [("<image>", record["txt"].decode())]
        assert repr(record["__key__"]) in sample.origin and "part-00" in sample.origin
    assert ImageProcessor(window_size=8).process(dataset[5].images[0]).pixel_values.shape == (1, 3, 8, 8)
    assert dataset.image_sizes(3) == [(12, 20)] and dataset.num_images(3) == 1


def test_captions_come_from_json_where_asked(shards):
    assert WebDataset(shards, caption_key="alt")[7].turns == [("<image>", "alt 7")]
    asked = WebDataset(shards, question="what ?")
    assert asked[7].turns == [("<image>what ?", "caption é 7")]
    with pytest.raises(BadSample, match="key '00003': JSON must have a text 'width'") as error:
        WebDataset(shards, caption_key="width")[3]
    assert error.value.reason == "missing_text"


def test_names_are_grouped_as_the_library_groups_them(tmp_path):
    """Folders, several dots, capital letters, members that are no files of a key, a key that comes twice."""
    names = [
        "a/b.JPG",
        "a/b.txt",
        "c.d.txt",
        "c.jpg",
        "c.txt",
        "noext",
        "__meta__/x.txt",
        ".hidden",
        "a/b.Png",
    ]
    path = tmp_path / "names.tar"
    write_tar(path, [(name, jpeg(9) if "g" in name[-2:].lower() else name.encode()) for name in names])
    expected = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    dataset = WebDataset(str(path))
    assert len(dataset) == len(expected) == 3
    assert dataset[0].turns == [("<image>", "a/b.txt")] and dataset[1].turns == [("<image>", "c.txt")]
    with pytest.raises(BadSample, match="key 'a/b': key must have a caption, got none"):
        dataset[2]


@pytest.mark.parametrize(
    ("members", "reason", "message"),
    [
        ([("k.txt", b"text")], "missing_image", "key must have an image, got none"),
        ([("k.jpg", b"x"), ("k.cls", b"3")], "missing_text", "key must have a caption, got none"),
        ([("k.jpg", b"x"), ("k.txt", b"\xff\xfe")], "bad_text", "caption must be UTF-8"),
        ([("k.jpg", b"x"), ("k.txt", b" \n")], "empty_answer", "caption must not be empty"),
        ([("k.jpg", b"x"), ("k.json", b"{")], "bad_json", "JSON must be readable, got b'{'"),
        ([("k.jpg", b"x"), ("k.json", b"[1]")], "missing_text", "JSON must have a text 'caption', got [1]"),
        ([("k.jpg", b"x"), ("k.png", b"x"), ("k.txt", b"a")], "duplicate_file", "one image, got several"),
        ([("k.jpg", b"x"), ("k.txt", b"b"), ("k.txt", b"a")], "duplicate_file", "one text, got several"),
    ],
)
def test_bad_keys_are_named(tmp_path, members, reason, message):
    path = tmp_path / "bad.tar"
    write_tar(path, members)
    with pytest.raises(BadSample) as error:
        WebDataset(str(path))[0]
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{path} key 'k': ") and message in str(error.value)
    assert WebDataset(str(path)).image_sizes(0) == []


def test_a_shard_that_was_cut_off_keeps_its_whole_files(tmp_path):
    """At every length: whole keys are read, a cut one is named, and the note says so. Nothing is silent."""
    members = [
        (f"{i}.{kind}", jpeg(i) if kind == "jpg" else b"text %d" % i)
        for i in range(3)
        for kind in ("jpg", "txt")
    ]
    path = tmp_path / "whole.tar"
    write_tar(path, members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [(member.offset_data, member.offset_data + member.size) for member in tar]
    full = ends[-1][1] + (-ends[-1][1]) % 512 + 512
    for length in [*range(512, full, 171), full - 1]:
        cut = tmp_path / f"{length}.tar"
        cut.write_bytes(whole[:length])
        dataset = WebDataset(str(cut))
        begun = sum(start <= length for start, _ in ends)
        assert len(dataset.notes) == 1 and f"{cut} is damaged or cut off" in dataset.notes[0]
        assert len(dataset) == (begun + 1) // 2
        good = 0
        for i in range(len(dataset)):
            try:
                assert bytes_of(dataset[i]) == members[2 * i][1]
                assert dataset[i].turns == [("<image>", f"text {i}")]
                good += 1
            except BadSample as error:
                assert error.reason in ("missing_image", "missing_text")
        assert good == sum(ends[2 * i + 1][1] <= length for i in range(3))
    broken = tmp_path / "header.tar"
    broken.write_bytes(whole[: ends[1][1] + (-ends[1][1]) % 512] + b"\x07" * 2048)
    assert len(WebDataset(str(broken))) == 1 and "no header at byte" in WebDataset(str(broken)).notes[0]


def test_the_index_is_kept_checked_and_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_tar(path, [("0.jpg", jpeg(1)), ("0.txt", b"first")])
    assert len(WebDataset(str(path))) == 1
    beside = tmp_path / "a.tar.index.npz"
    assert beside.is_file() and sorted(tmp_path.iterdir()) == [path, beside]

    made = []
    original = tar_index._make
    monkeypatch.setattr(tar_index, "_make", lambda *shard: made.append(shard) or original(*shard))
    assert WebDataset(str(path))[0].turns == [("<image>", "first")] and not made
    write_tar(path, [(f"{i}.{kind}", b"new") for i in range(2) for kind in ("jpg", "txt")])
    assert len(WebDataset(str(path))) == 2 and len(made) == 1  # the file is another one now
    os.utime(path, ns=(1, 1))
    assert len(WebDataset(str(path))) == 2 and len(made) == 2
    for damaged in (b"", beside.read_bytes()[:-40], os.urandom(200)):
        beside.write_bytes(damaged)
        assert WebDataset(str(path))[1].turns == [("<image>", "new")]
    assert len(made) == 5

    def full(*_):
        raise OSError("read-only file system")

    beside.unlink()
    monkeypatch.setattr(tar_index.os, "replace", full)
    assert len(WebDataset(str(path))) == 2
    assert sorted(tmp_path.iterdir()) == [path]


def test_few_indices_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.shards._OPEN_INDICES", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", [("k.jpg", jpeg(i)), ("k.txt", b"%d" % i)])
    dataset = WebDataset(f"{tmp_path}/*.tar")
    order = np.random.default_rng(0).integers(5, size=40)
    assert [dataset[int(i)].turns[0][1] for i in order] == [str(i) for i in order]
    assert len(dataset._open) == 2


def test_patterns(tmp_path):
    for name in ("s-08.tar", "s-09.tar", "s-10.tar", "t.tar"):
        write_tar(tmp_path / name, [("k.jpg", b"x"), ("k.txt", b"a")])

    def names(path) -> list[str]:
        return [found.name for found in expand(path)]

    assert names(f"{tmp_path}/s-{{08..10}}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert names(f"{tmp_path}/{{s-1{{0..0}},t}}.tar".replace("{0..0}", "0")) == ["s-10.tar", "t.tar"]
    assert names([f"{tmp_path}/t.tar", f"{tmp_path}/s-0?.tar"]) == ["t.tar", "s-08.tar", "s-09.tar"]
    for path, message in (
        (f"{tmp_path}/s-{{08..11}}.tar", "data.path must name existing shards, got '.*s-11.tar'"),
        (f"{tmp_path}/u*.tar", "data.path must name existing shards, got '.*u[*].tar'"),
        (f"{tmp_path}/s-{{10..08}}.tar", "count upwards in braces"),
        ([], "must be the name of shards or a list of them"),
        ([3], "must be the name of shards or a list of them"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(path)


def test_files_that_are_no_shards(tmp_path):
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("k.txt"))
    with pytest.raises(ValueError, match="tar files that are not compressed, got '.*packed.tar'"):
        WebDataset(str(packed))
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ValueError, match="data.path must hold at least one record"):
        WebDataset(str(tmp_path / "empty.tar"))
    write_tar(tmp_path / "good.tar", [("k.jpg", jpeg(3)), ("k.txt", json.dumps("a").encode())])
    both = WebDataset([str(tmp_path / "empty.tar"), str(tmp_path / "good.tar")])
    assert len(both) == 1 and "no bytes" in both.notes[0] and both[0].turns == [("<image>", '"a"')]
    with pytest.raises(ValueError, match="data.options must fit dataset 'webdataset'"):
        build_dataset(DataConfig(name="webdataset", path=str(packed), options={"captions": 1}))
    with pytest.raises(ValueError, match="data.options.caption_key must be a text, got 3"):
        WebDataset(str(tmp_path / "good.tar"), caption_key=3)
