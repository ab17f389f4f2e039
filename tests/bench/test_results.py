"""Result files: whole after every entry, and without the machine in them."""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import results

ENDLESS = """
import sys
from pathlib import Path
from bench.results import Writer
writer = Writer([Path(p) for p in sys.argv[1:]], {"gpu": "none"})
while True:
    writer.add({"number": len(writer.document["entries"]), "text": "x" * 2000})
"""


def test_a_killed_run_leaves_a_whole_file(tmp_path):
    paths = [tmp_path / "new" / "a.json", tmp_path / "b.json"]
    for delay in (0.0, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, *map(str, paths)], cwd=results.ROOT)
        try:
            for path in paths:
                path.unlink(missing_ok=True)
            limit = time.monotonic() + 60
            while not all(map(Path.exists, paths)) and time.monotonic() < limit:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        for path in paths:
            document = results.load(path)
            assert document["finished"] is False
            assert [entry["number"] for entry in document["entries"]] == list(range(len(document["entries"])))
    assert results.load(paths[0])["entries"]


def test_finish_is_written(tmp_path):
    writer = results.Writer([tmp_path / "a.json"], {"gpu": "none"})
    writer.put("build", {"status": "ok"})
    writer.finish()
    document = results.load(tmp_path / "a.json")
    assert document["finished"] is True and document["build"] == {"status": "ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_no_host_and_no_folder_reaches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "machine7")
    places = [str(results.ROOT / "bench" / "x.py"), sys.prefix + "/lib/y", str(Path.home() / "z")]
    reason = f"{' '.join(places)} on machine7 failed"
    writer = results.Writer([tmp_path / "a.json"], {"gpu": "none"})
    writer.add({"reason": reason, "list": [reason], "nested": {"text": reason}})
    text = (tmp_path / "a.json").read_text()
    for hidden in ("machine7", str(results.ROOT), sys.prefix, str(Path.home()) + "/"):
        assert hidden not in text
    assert "bench/x.py" in text and "failed" in text


def test_what_json_cannot_hold_becomes_null(tmp_path):
    writer = results.Writer([tmp_path / "a.json"], {})
    writer.add({"error": float("inf"), "eager_error": float("nan"), "median_us": 1.5})
    assert results.load(tmp_path / "a.json")["entries"] == [
        {"error": None, "eager_error": None, "median_us": 1.5}
    ]


def test_no_run_replaces_another(tmp_path):
    header = {"gpu": "NVIDIA H200 NVL", "date": "2030-01-02"}
    names = []
    for _ in range(3):
        path = results.default_path(header, tmp_path)
        path.write_text("{}")
        names.append(path.name)
    stem = "nvidia-h200-nvl-2030-01-02"
    assert names == [f"{stem}.json", f"{stem}-2.json", f"{stem}-3.json"]


def test_header_says_what_a_number_needs():
    found = results.header(torch.device("cpu"), "python -m bench.gpu", 9.0)
    assert found["torch"] == torch.__version__ and found["compute_capability"] is None
    assert found["date"] == datetime.date.today().isoformat() and found["budget_s"] == 9.0
    assert {"gpu", "driver", "cuda", "triton", "nvcc", "python", "commit", "command"} <= found.keys()
    assert socket.gethostname() not in json.dumps(found)


def test_commit_of_a_copy_without_history(monkeypatch):
    monkeypatch.setattr(results, "_run", lambda *command: "")
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert results.header(torch.device("cpu"), "", 1.0)["commit"] == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    assert results.header(torch.device("cpu"), "", 1.0)["commit"] == "unknown"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"header": {}}', "nonsense"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="path must be a results file of bench.gpu, got"):
        results.load(path)
