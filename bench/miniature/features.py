"""What the frozen encoders see of every page, computed once for all arms and seeds of a view."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.vision import VisionTransformer

from .arms import processor
from .pages import Page, Pages, Word
from .sizes import Size, base_config
from .storage import load_tensors, save_tensors
from .warmup import autocast

SPLITS = {"train": 11, "held_out": 12}
"""The seed of each split's pages."""
PAGES_AT_ONCE = 32


def pages_of(size: Size, split: str) -> tuple[Pages, int]:
    """A split's pages and how many of them are used."""
    count = size.train_pages if split == "train" else size.evaluated_pages
    return Pages(size=size.page, font_sizes=size.font_sizes, split=split, seed=SPLITS[split]), count


class Views(Dataset):
    """Item i: the windows [n, 3, P, P] of page i in a view, and its words."""

    def __init__(self, size: Size, view: str, split: str) -> None:
        self.pages, self.count = pages_of(size, split)
        self.processor = processor(size, view)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[Word, ...]]:
        page: Page = self.pages[index]
        return self.processor.process(page.pixels).pixel_values, page.words


def compute(size: Size, view: str, split: str, folder: Path, device: torch.device) -> None:
    """folder/features/<view>-<split>.pt: `features` [pages, windows, tokens, width] float16 and the words of
    every page; for "whole", which trains inside its encoder, `pixels` [pages, 3, P, P] float16."""
    path = folder / "features" / f"{view}-{split}.pt"
    if path.exists():
        return
    vision = None
    if view != "whole":
        vision = VisionTransformer(base_config(size).vision_config)
        kept = load_tensors(folder / "warm_up" / ("vision_low.pt" if view == "low" else "vision.pt"))
        if view == "low":
            vision.set_window_size(size.window // 2)
        vision.load_state_dict(kept["part"])
        vision.to(device).eval()
    parts, words = [], []
    loader = DataLoader(
        Views(size, view, split), batch_size=PAGES_AT_ONCE, collate_fn=list, num_workers=size.loader_workers
    )
    for batch in loader:
        pixels = torch.stack([windows for windows, _ in batch])  # [pages, windows, 3, P, P]
        words += [[_plain(word) for word in of_page] for _, of_page in batch]
        if vision is None:
            parts.append(pixels[:, 0].half())
            continue
        with torch.no_grad(), autocast(device):
            found = vision(pixels.flatten(0, 1).to(device))
        parts.append(found.unflatten(0, pixels.shape[:2]).half().cpu())
    name = "pixels" if view == "whole" else "features"
    save_tensors(path, {name: torch.cat(parts), "words": words})


def _plain(word: Word) -> list:
    return [word.text, word.colour, word.font_size, word.place, word.left, word.top]


class SeenPages:
    """The pages of a split in one view: `words[i]`, and `visual(indices)` what the model is given of them."""

    def __init__(self, folder: Path, view: str, split: str) -> None:
        kept = load_tensors(folder / "features" / f"{view}-{split}.pt", mmap=True)
        self.words = [[Word(*word) for word in of_page] for of_page in kept["words"]]
        self.is_pixels = "pixels" in kept
        self._kept = kept["pixels" if self.is_pixels else "features"]

    def __len__(self) -> int:
        return len(self.words)

    def visual(self, indices: list[int], device: torch.device) -> Tensor:
        """Pixels [pages, 3, P, P], or features [pages, windows, tokens, width], float32."""
        return self._kept[indices].to(device).float()
