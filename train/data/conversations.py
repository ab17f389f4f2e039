"""LLaVA conversations."""

from pathlib import Path
from typing import Any

from .images import existing_folder, existing_image
from .records import JsonRecords
from .samples import IMAGE_MARK, BadSample, RecordDataset, Sample, short


class ConversationDataset(RecordDataset):
    """LLaVA conversations, one JSON record a line or all in one JSON array:
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nquestion"},
    {"from": "gpt", "value": "answer"}, ...]}. Blank lines and a UTF-8 byte-order mark are skipped.

    `image` is a file name, a list of them, or missing; `<image>` stands once for each, in the questions. The
    only image of a record, marked anywhere in its first question, comes before that question, as LLaVA
    itself reads such records. Image paths start at `image_root` (default: the file's folder). Records are
    checked when they are read: a bad one is a `BadSample` that names file, place, rule and value. ValueError
    if the file is missing, empty or a damaged JSON array."""

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self._records = JsonRecords(path)
        self.image_root = existing_folder(image_root, self._records.path.parent)

    def __len__(self) -> int:
        return len(self._records)

    def num_images(self, index: int) -> int:
        """What the record says; 0 where it is not JSON."""
        try:
            return len(_names(self._records.load_object(index)))
        except BadSample:
            return 0

    def _sample(self, index: int) -> Sample:
        origin = self._records.place(index)
        record = self._records.load_object(index)
        names = _names(record)
        images = [existing_image(self.image_root, name, origin) for name in names]
        return Sample(images, _turns(record.get("conversations"), len(images), origin), origin=origin)


def _names(record: dict[str, Any]) -> list[Any]:
    names = record.get("image")
    return names if isinstance(names, list) else [] if names is None else [names]


def _turns(conversation: Any, num_images: int, origin: str) -> list[tuple[str, str]]:
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        rule = "conversations must be a list of pairs of messages"
        raise BadSample("bad_conversation", f"{origin}: {rule}, got {short(conversation)}")
    texts = []
    for number, message in enumerate(conversation):
        sender = "gpt" if number % 2 else "human"
        if not isinstance(message, dict) or message.get("from") != sender:
            rule = f"message {number + 1} must be from {sender!r}"
            raise BadSample("bad_conversation", f"{origin}: {rule}, got {short(message)}")
        if not isinstance(message.get("value"), str):
            rule = f"message {number + 1} must have a text value"
            raise BadSample("bad_conversation", f"{origin}: {rule}, got {short(message)}")
        texts.append(message["value"].strip())
    marks = [text.count(IMAGE_MARK) for text in texts]
    if sum(marks) != num_images or any(marks[1::2]):
        rule = f"<image> must stand once for each image ({num_images}), in questions alone"
        raise BadSample("image_marks", f"{origin}: {rule}, got {short(marks)} by message")
    for number, text in enumerate(texts):
        text = text.replace(IMAGE_MARK, "").strip()
        if not text:
            name = "answer" if number % 2 else "question"
            raise BadSample(
                f"empty_{name}", f"{origin}: {name} {number // 2 + 1} must not be empty, got {text!r}"
            )
    if num_images == 1 and marks[0] == 1:
        texts[0] = IMAGE_MARK + texts[0].replace(IMAGE_MARK, "").strip()
    return list(zip(texts[::2], texts[1::2], strict=True))
