"""Datasets by the name that `data.name` chooses."""

import importlib
from typing import Any

from ..config import DataConfig
from ..fields import nearest_name
from .samples import Dataset

DATASETS = {
    "conversations": "train.data.conversations:ConversationDataset",
    "webdataset": "train.data.shards:WebDataset",
    "mmc4": "train.data.interleaved:MMC4Dataset",
    "obelics": "train.data.interleaved:ObelicsDataset",
    "vqa": "train.data.vqa:VQADataset",
    "captions": "train.data.captions:CaptionDataset",
    "regions": "train.data.regions:RegionDataset",
    "manifest": "train.data.manifest:load_manifest",
    "painted": "train.demo.painted:PaintedPhotographs",
}
"""Values of `data.name`, as module:class; the module is imported when the name is used."""


def build_dataset(config: DataConfig) -> Dataset:
    """The dataset that `config` names, made with `path` and `image_root`, where given, and `options`."""
    given = {"path": config.path, "image_root": config.image_root}
    arguments = {name: value for name, value in given.items() if value is not None} | config.options
    return make_dataset(config.name, arguments, "data.")


def make_dataset(name: str, arguments: dict[str, Any], prefix: str) -> Dataset:
    """The dataset `name` made with `arguments`; `prefix` begins the names in what is wrong with them."""
    if name not in DATASETS:
        nearest = nearest_name(str(name), list(DATASETS))
        raise ValueError(
            f"{prefix}name must be one of {', '.join(DATASETS)}, got {name!r}; did you mean {nearest!r}?"
        )
    module, _, attribute = DATASETS[name].partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(
            f"{prefix}name must be a dataset whose packages are installed, got {name!r}: {error}"
        ) from error
    try:
        return factory(**arguments)
    except TypeError as error:
        raise ValueError(f"{prefix}options must fit dataset {name!r}, got {arguments}: {error}") from error
