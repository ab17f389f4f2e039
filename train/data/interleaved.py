"""Interleaved documents: images between texts, as MMC4 and OBELICS publish them."""

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .fields import list_of
from .images import Base64Image, existing_folder, existing_image
from .records import JsonRecords
from .samples import IMAGE_MARK, BadSample, RecordDataset, Sample, short


class _Documents(RecordDataset):
    """Records of documents; a document without an image left is a `BadSample`, as it teaches nothing."""

    def __init__(
        self, path: str | Path, image_root: str | Path | None = None, max_images: int | None = None
    ) -> None:
        legal = max_images is None or (isinstance(max_images, int) and max_images >= 1)
        if not legal:
            raise ValueError(f"data.options.max_images must be an int of at least 1, got {max_images!r}")
        self._records = JsonRecords(path)
        self.image_root = existing_folder(image_root, self._records.path.parent)
        self.max_images = max_images

    def __len__(self) -> int:
        return len(self._records)

    def num_images(self, index: int) -> int:
        """What the record says, before it is known which of them can be read; 0 where it is not JSON."""
        try:
            listed = self._listed(self._records.load_object(index))
        except BadSample:
            return 0
        return listed if self.max_images is None else min(listed, self.max_images)

    @abc.abstractmethod
    def _listed(self, record: dict[str, Any]) -> int:
        """Images that the record lists."""

    def _document(self, parts: Iterable[tuple[bool, Any]], origin: str) -> Sample:
        """Sample of (is an image, image or text) in their order. Neighbouring texts become one; images that
        no text follows are left out, like those beyond `max_images`."""
        images, turns, waiting = [], [], []
        for is_image, part in parts:
            if is_image:
                if self.max_images is None or len(images) + len(waiting) < self.max_images:
                    waiting.append(part)
            elif part.strip():
                if waiting or not turns:
                    turns.append([IMAGE_MARK * len(waiting), part.strip()])
                    images += waiting
                    waiting = []
                else:
                    turns[-1][1] += " " + part.strip()
        if not turns:
            raise BadSample("empty_answer", f"{origin}: document must hold a text, got none")
        if not images:
            raise BadSample("no_image", f"{origin}: document must hold an image before a text, got none")
        return Sample(images, [tuple(turn) for turn in turns], "plain", origin)


class MMC4Dataset(_Documents):
    """MMC4's documents, JSON lines: {"text_list": [...], "image_info": [{"matched_text_index": 3,
    "matched_sim": 0.31, "image_name": "a.jpg" or "image_base64": "..."}, ...]}.

    An image comes before the text it is matched with. Images whose `matched_sim` is below `min_similarity`
    are left out, like those beyond the first `max_images`. File names start at `image_root` (default: the
    file's folder)."""

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        min_similarity: float | None = None,
        max_images: int | None = None,
    ) -> None:
        super().__init__(path, image_root, max_images)
        if min_similarity is not None and not isinstance(min_similarity, (int, float)):
            raise ValueError(f"data.options.min_similarity must be a number, got {min_similarity!r}")
        self.min_similarity = min_similarity

    def _sample(self, index: int) -> Sample:
        origin, record = self._records.place(index), self._records.load_object(index)
        texts = list_of(record, "text_list", origin)
        before: dict[int, list[Any]] = {}
        for number, info in enumerate(list_of(record, "image_info", origin), start=1):
            here = f"{origin} image {number}"
            if not isinstance(info, dict):
                raise BadSample("bad_record", f"{here}: must be an object, got {short(info)}")
            place = info.get("matched_text_index")
            if type(place) is not int or not 0 <= place < len(texts):
                rule = f"matched_text_index must lie in 0..{len(texts) - 1}"
                raise BadSample("bad_record", f"{here}: {rule}, got {short(place)}")
            if self._is_similar(info.get("matched_sim"), here):
                before.setdefault(place, []).append((info, here))
        parts: list[tuple[bool, Any]] = []
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise BadSample("bad_record", f"{origin}: text_list must hold texts, got {short(text)}")
            parts += [(True, self._image(*found)) for found in before.get(place, ())]
            parts.append((False, text))
        return self._document(parts, origin)

    def _listed(self, record: dict[str, Any]) -> int:
        images, least = record.get("image_info"), self.min_similarity
        if not isinstance(images, list):
            return 0
        similar = [info.get("matched_sim") for info in images if isinstance(info, dict)]
        return sum(least is None or (type(s) in (int, float) and s >= least) for s in similar)

    def _is_similar(self, similarity: Any, here: str) -> bool:
        if self.min_similarity is None:
            return True
        if type(similarity) not in (int, float):
            raise BadSample("bad_record", f"{here}: matched_sim must be a number, got {short(similarity)}")
        return similarity >= self.min_similarity

    def _image(self, info: dict[str, Any], here: str) -> Any:
        encoded = info.get("image_base64")
        if encoded is None:
            return existing_image(self.image_root, info.get("image_name"), here)
        if not isinstance(encoded, str):
            raise BadSample("bad_record", f"{here}: image_base64 must be a text, got {short(encoded)}")
        return Base64Image(here, encoded)


class ObelicsDataset(_Documents):
    """OBELICS' documents, JSON lines: {"images": ["a.jpg", null, ...], "texts": [null, "text", ...]}, two
    lists of one length with one of the two at each place; the images are stored under `image_root` (default:
    the file's folder). Images beyond the first `max_images` are left out."""

    def _listed(self, record: dict[str, Any]) -> int:
        images = record.get("images")
        return sum(image is not None for image in images) if isinstance(images, list) else 0

    def _sample(self, index: int) -> Sample:
        origin, record = self._records.place(index), self._records.load_object(index)
        images, texts = (list_of(record, name, origin) for name in ("images", "texts"))
        if len(images) != len(texts):
            rule = f"images and texts must have one length, got {len(images)} and {len(texts)}"
            raise BadSample("bad_record", f"{origin}: {rule}")
        parts: list[tuple[bool, Any]] = []
        for number, (image, text) in enumerate(zip(images, texts, strict=True), start=1):
            here = f"{origin} part {number}"
            if (image is None) == (text is None):
                rule = "must be an image or a text"
                raise BadSample("bad_record", f"{here}: {rule}, got {short(image)} and {short(text)}")
            if image is not None:
                parts.append((True, existing_image(self.image_root, image, here)))
            elif isinstance(text, str):
                parts.append((False, text))
            else:
                raise BadSample("bad_record", f"{here}: text must be a text, got {short(text)}")
        return self._document(parts, origin)
