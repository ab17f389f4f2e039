"""Descriptions of regions of images, as Visual Genome publishes them."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .fields import list_of, text_of
from .images import existing_folder, existing_image, image_size
from .records import JsonRecords
from .samples import IMAGE_MARK, BadSample, RecordDataset, Sample, short

_NO_REGION = -1
_BOX = ("x", "y", "width", "height")


class RegionDataset(RecordDataset):
    """One region of Visual Genome's region_descriptions.json a sample: the question names the region's box,
    the answer is its description.

    The file is a list of {"id": 1, "regions": [{"image_id": 1, "x": 10, "y": 20, "width": 30, "height": 40,
    "phrase": "..."}, ...]}. The box is written as left, top, right and bottom in the image, from 0 to 1 with
    three decimals, cut at the image's border, at {box} in `question`. Images are `IMAGE_ID.jpg` in the first
    of `folders` under `image_root` (default: the file's folder) that has it."""

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        folders: Sequence[str] = ("", "VG_100K", "VG_100K_2"),
        question: str = "What is in the region {box} of the image?",
    ) -> None:
        if not isinstance(question, str) or "{box}" not in question:
            raise ValueError(f"data.options.question must be a text with {{box}}, got {question!r}")
        legal = isinstance(folders, (list, tuple)) and all(isinstance(name, str) for name in folders)
        if not legal or not folders:
            raise ValueError(f"data.options.folders must be a list of names, got {folders!r}")
        self.folders, self.question = folders, question
        # of every sample: its record, and its region there
        self._of_record, self._region = array("q"), array("q")
        self._num_records = 0
        self._records = JsonRecords(path, visit=self._add)
        self.image_root = existing_folder(image_root, self._records.path.parent)
        if not self._of_record:
            raise ValueError(f"data.path must hold at least one region, got none in {str(path)!r}")

    def _add(self, record: Any) -> None:
        regions = record.get("regions") if isinstance(record, dict) else None
        places = range(len(regions)) if isinstance(regions, list) else [_NO_REGION]
        for place in places:
            self._of_record.append(self._num_records)
            self._region.append(place)
        self._num_records += 1

    def __len__(self) -> int:
        return len(self._of_record)

    def num_images(self, index: int) -> int:
        return 1

    def _sample(self, index: int) -> Sample:
        number, place = self._of_record[index], self._region[index]
        origin, record = self._records.place(number), self._records.load_object(number)
        regions = list_of(record, "regions", origin)
        origin, region = f"{origin} region {place + 1}", regions[place]
        if not isinstance(region, dict):
            raise BadSample("bad_record", f"{origin}: must be an object, got {short(region)}")
        phrase = text_of(region, "phrase", origin)
        image = self._image(region.get("image_id", record.get("id")), origin)
        size = image_size(image)
        if size is None:
            rule = "image must be a readable picture"
            raise BadSample("unreadable_image", f"{origin}: {rule}, got {short(str(image))}")
        question = self.question.replace("{box}", _box(region, *size, origin))
        return Sample([image], [(IMAGE_MARK + question, phrase)], origin=origin)

    def _image(self, image_id: Any, origin: str) -> Path:
        if not isinstance(image_id, (int, str)) or isinstance(image_id, bool) or image_id == "":
            raise BadSample("bad_record", f"{origin}: image_id must be a number, got {short(image_id)}")
        for folder in self.folders[:-1]:
            try:
                return existing_image(self.image_root / folder, f"{image_id}.jpg", origin)
            except BadSample:
                continue
        return existing_image(self.image_root / self.folders[-1], f"{image_id}.jpg", origin)


def _box(region: dict[str, Any], height: int, width: int, origin: str) -> str:
    """The region's box as text, from numbers of pixels."""
    values = [region.get(name) for name in _BOX]
    if not all(type(value) in (int, float) for value in values):
        raise BadSample("bad_box", f"{origin}: {', '.join(_BOX)} must be numbers, got {short(values)}")
    x, y, w, h = values
    try:
        edges = (x / width, y / height, (x + w) / width, (y + h) / height)
    except OverflowError:  # JSON's whole numbers have any length
        edges = (0.0,) * 4
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in edges)
    if not (left < right and top < bottom):  # NaN is refused too
        rule = f"box must have an area inside the image of {width} x {height}"
        raise BadSample("bad_box", f"{origin}: {rule}, got {short(values)}")
    return f"[{left:.3f}, {top:.3f}, {right:.3f}, {bottom:.3f}]"
