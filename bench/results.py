"""Result files: JSON that is valid after every entry, and says on what and how it was measured, not where."""

import datetime
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from infimm_kernels.__main__ import versions

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


class Writer:
    """Keeps one document in one or several files, each replaced at once whenever the document grows.

    A reader, or whoever finds the file after a cut run, always sees a whole document; "finished" in it is
    false until `finish`.
    """

    def __init__(self, paths: list[Path], header: dict[str, Any]):
        self.document: dict[str, Any] = {"header": header, "entries": [], "finished": False}
        self._paths = paths
        self._write()

    def add(self, entry: dict[str, Any]) -> None:
        self.document["entries"].append(scrub(entry))
        self._write()

    def put(self, key: str, value: Any) -> None:
        """Set a part of the document beside the entries."""
        self.document[key] = scrub(value)
        self._write()

    def finish(self) -> None:
        self.put("finished", True)

    def _write(self) -> None:
        text = json.dumps(self.document, indent=1, allow_nan=False) + "\n"
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)


def scrub(value: Any) -> Any:
    """The same value without the machine's name and folders, and with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return value
    for folder in _folders():
        value = value.replace(folder, "")
    name = socket.gethostname()
    return re.sub(rf"\b{re.escape(name)}\b", "host", value) if len(name) > 2 else value


def _folders() -> list[str]:
    """Longest first, so that a folder inside another goes whole."""
    paths = {sysconfig.get_path(key) for key in ("purelib", "platlib", "stdlib")}
    paths |= {str(ROOT), sys.prefix, sys.base_prefix, tempfile.gettempdir(), str(Path.home())}
    return sorted((path.rstrip("/") + "/" for path in paths if len(path) > 1), key=len, reverse=True)


def header(device: torch.device, command: str, budget_s: float) -> dict[str, Any]:
    """What a number needs to mean something."""
    found = versions()
    gpu, capability, driver = f"none ({platform.processor() or platform.machine()})", None, None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        driver = _driver()
    return {
        "gpu": gpu,
        "compute_capability": capability,
        "driver": driver,
        "torch": found["torch"],
        "cuda": torch.version.cuda,
        "triton": found["triton"],
        "nvcc": _nvcc(),
        "python": found["python"],
        "commit": commit(),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "budget_s": budget_s,
    }


def default_path(found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """folder/<gpu>-<date>.json, with -2, -3 ... behind it where that exists: no run replaces another."""
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    names = (f"{gpu}-{found['date']}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(folder / name for name in names if not (folder / name).exists())


def of_gpu_runs(folder: Path = RESULTS) -> list[Path]:
    """The files of bench.gpu in `folder`; those of bench.miniature lie beside them."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("miniature-"))


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError when the file is no result file."""
    try:
        document = json.loads(path.read_text())
        complete = {"header", "entries", "finished"} <= document.keys()
    except (json.JSONDecodeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"path must be a results file of bench.gpu, got {path}")
    return document


def _run(*command: str) -> str:
    """Standard output, or "" when the program is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str:
    kernel_module = Path("/sys/module/nvidia/version")
    if kernel_module.exists():
        return kernel_module.read_text().strip()
    listed = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0] if listed else "unknown"


def _nvcc() -> str:
    nvcc = shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin")) or "nvcc"
    found = re.search(r"V(\d+\.\d+\.\d+)", _run(nvcc, "--version"))
    return found.group(1) if found else "not found"


def commit() -> str:
    """Of the checkout, or from GIT_COMMIT where the files are a copy without history."""
    commit = _run("git", "rev-parse", "HEAD")
    if not commit:
        return os.environ.get("GIT_COMMIT", "unknown")
    return commit + (" with changes" if _run("git", "status", "--porcelain", "--untracked-files=no") else "")
