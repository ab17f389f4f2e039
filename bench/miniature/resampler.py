"""The resamplers' part of the warm-up: latents that find the words of a page in the frozen features.

A resampler that starts from nothing between frozen parts learns to read from answers in none of the steps
that an arm has (bench/LOG.md), and its arms would show that alone. It is taught like the encoders: latent i
names colour and digits of the word in quarter i under throw-away heads, and the arms start from there."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from model.connector import build_connector
from train.data.painting import COLOUR_NAMES
from train.demo.painted import DIGITS

from .arms import ARMS, RESAMPLERS, arm_config
from .features import SeenPages
from .pages import PLACES, WORD_LENGTH, Word
from .sizes import Size
from .storage import save_tensors
from .warmup import KEEP_EVERY, START, train_part

_SEEDS = {"448-resampler": 105, "224-resampler": 106}
CLASSES = (len(COLOUR_NAMES) + 1, *[len(DIGITS) + 1] * WORD_LENGTH)


def named(words: list[Word]) -> Tensor:
    """[places, 1 + digits] of a page: colour + 1 and digits + 1, all 0 where no word is."""
    found = torch.zeros(len(PLACES), len(CLASSES), dtype=torch.long)
    for word in words:
        found[word.place] = torch.tensor([word.colour + 1, *(DIGITS.index(digit) + 1 for digit in word.text)])
    return found


class NamedPages(Dataset):
    """Item i: (features [tokens, width] of a page with one window, its `named` words), drawn by i alone."""

    def __init__(self, pages: SeenPages, seed: int) -> None:
        self.pages, self.seed = pages, seed

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 10**9 + index)
        page = int(torch.randint(len(self.pages), (), generator=generator))
        return self.pages.visual([page], torch.device("cpu"))[0, 0], named(self.pages.words[page])


def warm_up_resampler(size: Size, folder: Path, device: torch.device, arm: str) -> None:
    """folder/warm_up/<the arm's part>.pt, from the features in `folder`."""
    torch.manual_seed(START)
    config = arm_config(size, arm)
    width = config.vision_config.hidden_size
    resampler = build_connector(config.connector, width, width)
    heads = nn.ModuleList(nn.Linear(width, n) for n in CLASSES)
    both = nn.ModuleDict({"part": resampler, "heads": heads}).to(device)
    right: list[float] = []

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        features, expected = (x.to(device) for x in batch)
        # as many latents as quarters, or more, which are not asked
        latents = resampler(features)[:, : len(PLACES)]
        logits = [head(latents).float() for head in heads]
        has_word = expected[..., 0] > 0
        found = [(x.argmax(-1) == expected[..., i])[has_word] for i, x in enumerate(logits)]
        right.append(torch.stack(found[1:]).float().mean().item())
        return sum(F.cross_entropy(x.flatten(0, 1), expected[..., i].flatten()) for i, x in enumerate(logits))

    data = NamedPages(SeenPages(folder, ARMS[arm].view, "train"), _SEEDS[arm])
    name = RESAMPLERS[arm]
    found = train_part(folder / "warm_up", name, size.resampler, both, data, loss_of, None, 0)
    last = sum(right[-KEEP_EVERY:]) / len(right[-KEEP_EVERY:])
    save_tensors(
        folder / "warm_up" / f"{name}.pt", {"part": resampler.state_dict(), "accuracy": last, **found}
    )
