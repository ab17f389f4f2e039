"""Captions of images, as COCO, VizWiz and TextCaps publish them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .fields import IdTable, filled, text_of
from .images import existing_folder, existing_image
from .records import JsonRecords
from .samples import IMAGE_MARK, BadSample, RecordDataset, Sample, short
from .vqa import chosen_form, chosen_name


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CaptionForm:
    key: str
    """Name of the list of captions in the file's object."""
    caption: str
    """Field of the text."""
    image: str
    """Name of the image file, with {fields} of the record or, where there are `images`, of the image's."""
    images: str | None = None
    """Name of the list of images, which captions name by `image_id`."""


CAPTION_FORMS: Mapping[str, CaptionForm] = MappingProxyType(
    {
        "coco": CaptionForm(key="annotations", caption="caption", image="{file_name}", images="images"),
        "textcaps": CaptionForm(key="data", caption="caption_str", image="{image_id}.jpg"),
    }
)


class CaptionDataset(RecordDataset):
    """One caption a sample. `form` "coco" reads COCO's and VizWiz' files, "textcaps" TextCaps'.

    Captions that VizWiz marks as rejected or as not its workers' own (`is_rejected`, `is_precanned`) are left
    out; `notes` tell their number. `question` stands between the image and its caption, `image_name` replaces
    the pattern of file names, which start at `image_root` (default: the file's folder)."""

    def __init__(
        self,
        path: str | Path,
        form: str = "coco",
        image_root: str | Path | None = None,
        image_name: str | None = None,
        question: str = "",
    ) -> None:
        if not isinstance(question, str):
            raise ValueError(f"data.options.question must be a text, got {question!r}")
        self.form, self.question = chosen_form(form, CAPTION_FORMS), question
        self.image_name = chosen_name(image_name, self.form.image)
        self._records = JsonRecords(path, key=self.form.key, visit=_is_accepted)
        self.image_root = existing_folder(image_root, self._records.path.parent)
        left_out = self._records.num_left_out
        self.notes = [f"{path}: {left_out} captions are marked as rejected"] if left_out else []
        if self.form.images is not None:
            self._images_by_id = IdTable()
            self._images = JsonRecords(
                path, key=self.form.images, visit=lambda record: self._images_by_id.add(record, "id")
            )
            self._images_by_id.close()

    def __len__(self) -> int:
        return len(self._records)

    def num_images(self, index: int) -> int:
        return 1

    def _sample(self, index: int) -> Sample:
        origin, record = self._records.place(index), self._records.load_object(index)
        caption = text_of(record, self.form.caption, origin)
        described = record
        if self.form.images is not None:
            place = self._images_by_id.find(record.get("image_id"))
            if place is None:
                rule = f"image_id must be one of the {self.form.images}"
                raise BadSample("missing_image", f"{origin}: {rule}, got {short(record.get('image_id'))}")
            described = self._images.load_object(place)
        image = existing_image(self.image_root, filled(self.image_name, described, origin), origin)
        return Sample([image], [(IMAGE_MARK + self.question, caption)], origin=origin)


def _is_accepted(record: Any) -> bool:
    if not isinstance(record, dict):
        return True  # named when it is read
    return record.get("is_rejected") is not True and record.get("is_precanned") is not True
