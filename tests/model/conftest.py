import pytest
import torch

from model import InfiMMHD, preset

IMAGE, END = 2, 3


@pytest.fixture
def model() -> InfiMMHD:
    """The tiny model with open gates and random weights everywhere, fp32."""
    return open_model()


def open_model(**fields) -> InfiMMHD:
    """`fields` of the tiny config, or of its gated blocks."""
    torch.manual_seed(0)
    config = preset("tiny")
    for name, value in fields.items():
        setattr(config if hasattr(config, name) else config.gated_cross_attention, name, value)
    model = InfiMMHD(config)
    for block in model.gated_blocks.values():
        torch.nn.init.normal_(block.attn_gate)
        torch.nn.init.normal_(block.ffn_gate)
    return model.eval()


def batch_of(rows: list[list[int]], windows: list[list[int]], window_size: int = 28, seed: int = 0) -> dict:
    """`rows` of token ids (right-padded), `windows[i]` the number of windows of each image of sample i."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(len(row) for row in rows)
    windows_per_image = [n for image in windows for n in image]
    total = sum(windows_per_image)
    positions = torch.randint(0, 3, (total, 2), generator=generator)
    return dict(
        input_ids=torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        attention_mask=torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows]),
        pixel_values=torch.randn(total, 3, window_size, window_size, generator=generator) if total else None,
        window_positions=positions if total else None,
        windows_per_image=torch.tensor(windows_per_image, dtype=torch.long),
        images_per_sample=torch.tensor([len(image) for image in windows]),
    )
