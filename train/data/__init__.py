"""Samples and where they come from: the dataset protocol, the order of reading, readers of published forms.

A dataset is anything with `len(dataset)` and `dataset[i] -> Sample`. It may be endless: `len` then returns a
huge number and the index decides the random draw, so that any sample can be made again. Nothing has a state:
what is read at a position depends on the seed and the position alone."""

from .conversations import ConversationDataset
from .limit import SkipLimit
from .mixture import Mixture
from .order import sample_index
from .registry import DATASETS, build_dataset
from .samples import IMAGE_MARK, BadSample, Dataset, RecordDataset, Sample

__all__ = [
    "DATASETS",
    "IMAGE_MARK",
    "BadSample",
    "ConversationDataset",
    "Dataset",
    "Mixture",
    "RecordDataset",
    "Sample",
    "SkipLimit",
    "build_dataset",
    "sample_index",
]
