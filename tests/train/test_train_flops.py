"""The closed form of a step's operations against torch's counter on real passes of small models."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import FORMULAS
from model import IGNORE_INDEX, InfiMMHD, InfiMMHDConfig, preset, variant
from train.config import PARTS
from train.flops import StepFlops, work_of_batch

ALL_SETS = [parts for n in (1, 2, 3) for parts in itertools.combinations(PARTS, n)]
VARIANTS = (
    "infimm-hd",
    "interval-2",
    "token-position",
    "mlp",
    "no-connector",
    "resampler",
    "all-earlier-images",
    "llava-style",
    "mixture-of-resolution",
    "mixture-of-resolution-gated",
)


def convolution_backward(grad, x, weight, *args, out_val=None, **kwargs) -> int:
    """torch's own formula of the weight's gradient counts a grouped convolution as a whole one."""
    needs_input, needs_weight, _ = args[-1]
    product = 2 * grad.shape[0] * grad[0, 0].numel() * weight.numel()
    return product * (needs_input + needs_weight)


convolution_backward._get_raw = True
COUNTED = FORMULAS | {torch.ops.aten.convolution_backward: convolution_backward}


def small_config(name: str, **changes) -> InfiMMHDConfig:
    """All sizes different, so that none can stand for another."""
    values = preset("tiny").to_dict()
    values["vision_config"] |= dict(
        window_size=21, hidden_size=48, num_layers=5, num_heads=3, intermediate_size=80, feature_layer=-2
    )
    values["gated_cross_attention"] |= dict(interval=1, num_heads=2, head_dim=24, ffn_ratio=2)
    values["connector"] |= dict(num_layers=2, num_latents=3, num_heads=2, head_dim=8)
    values["text_config"] |= dict(
        vocab_size=70,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
    )
    for part, fields in changes.items():
        values[part] |= fields
    return variant(InfiMMHDConfig.from_dict(values), name)


def batch_of(config: InfiMMHDConfig, windows_by_row: list[list[int]], text: int = 6) -> dict:
    """Rows of images of so many windows, a few text tokens before, between and behind them."""
    marks, rows = config.image_seq_length, []
    for images in windows_by_row:
        row = [5, 6]
        for windows in images:
            row += [config.image_token_id] * (windows * marks if marks else 1) + [7] * text
        rows.append(row)
    length = max(map(len, rows)) + 1
    ids = torch.tensor([row + [config.pad_token_id] * (length - len(row)) for row in rows])
    labels = torch.where(ids == 7, ids, IGNORE_INDEX)
    labels[:, 1] = 6
    windows = list(itertools.chain(*windows_by_row))
    size = config.vision_config.input_size
    batch = dict(
        input_ids=ids,
        attention_mask=ids != config.pad_token_id,
        labels=labels,
        images_per_sample=torch.tensor([len(images) for images in windows_by_row]),
        windows_per_image=torch.tensor(windows, dtype=torch.int64),
    )
    if windows:
        batch["pixel_values"] = torch.randn(sum(windows), 3, size, size)
        batch["window_positions"] = torch.zeros(sum(windows), 2, dtype=torch.int64)
    return batch


def counted(model: InfiMMHD, batch: dict) -> tuple[int, int]:
    """Operations of the forward and of the backward, as they run."""
    model.zero_grad()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as flops:
        loss = model(**batch).loss
        forward = flops.get_total_flops()
        loss.backward()
        return forward, flops.get_total_flops() - forward


def assert_counts(config: InfiMMHDConfig, batch: dict, checkpointing: bool = False, sets=ALL_SETS) -> None:
    torch.manual_seed(0)
    model = InfiMMHD(config).train()
    model.gradient_checkpointing = checkpointing
    work = work_of_batch(config, batch)
    for trainable in sets:
        model.set_trainable(trainable)
        cost = StepFlops(config, trainable, checkpointing).cost(work)
        assert (cost.forward, cost.backward) == counted(model, batch), trainable


@pytest.mark.sample(3)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_product_of_a_step_is_counted(name, checkpointing):
    """Exactly: nothing is left out, nothing approximated."""
    config = small_config(name)
    is_whole = name in ("infimm-hd", "mixture-of-resolution-gated")
    sets = ALL_SETS if is_whole else [PARTS, ("gated_cross_attention",), ("language",)]
    assert_counts(config, batch_of(config, [[2, 1], [3], []]), checkpointing, sets)


@pytest.mark.parametrize("name", ["infimm-hd", "llava-style"])
def test_a_batch_without_images_runs_one_blank_window(name):
    config = small_config(name)
    assert_counts(config, batch_of(config, [[], []]), sets=[PARTS, ("gated_cross_attention",)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pre_norm_encoder_with_all_its_blocks(checkpointing):
    changes = dict(block="pre_norm", activation="quick_gelu", key_bias=True, feature_layer=-1)
    config = small_config("infimm-hd", vision_config=changes, gated_cross_attention=dict(interval=2))
    sets = [PARTS, ("vision",), ("gated_cross_attention",), ("language",)]
    assert_counts(config, batch_of(config, [[1], [2]]), checkpointing, sets)


def test_sizes_alone_give_what_a_full_batch_gives():
    config = small_config("infimm-hd")
    flops = StepFlops(config, PARTS)
    ids = torch.full((2, 9), 7)
    ids[:, 0] = config.image_token_id
    batch = dict(input_ids=ids, labels=ids, windows_per_image=[2, 2], images_per_sample=[1, 1])
    # the first token's label is never used
    by_sizes = flops.of(num_windows=4, num_rows=2, row_length=9, num_answer_tokens=16)
    assert flops.of_batch(batch) == by_sizes
    assert by_sizes < flops.of(num_windows=4, num_rows=2, row_length=9)
    with pytest.raises(ValueError, match="num_windows must be at least 0, got -1"):
        flops.of(num_windows=-1, num_rows=2, row_length=9)


def test_what_is_made_again_can_be_left_out():
    """Without it checkpointing changes nothing, and a model that learns whole has twice the forward."""
    config = small_config("interval-2")
    sizes = dict(num_windows=2, num_rows=2, row_length=9)
    plain, checkpointed = (StepFlops(config, PARTS, checkpointing) for checkpointing in (False, True))
    assert plain.of(**sizes) < checkpointed.of(**sizes)
    model_flops = plain.of(**sizes, recomputed=False)
    assert model_flops == checkpointed.of(**sizes, recomputed=False) < plain.of(**sizes)
    work = work_of_batch(config, batch_of(config, [[1], [1]]))
    cost = plain.cost(work)
    vision = config.vision_config
    patches = 2 * work.num_windows * vision.num_tokens * 3 * vision.patch_size**2 * vision.hidden_size
    assert cost.backward - cost.recomputed == 2 * cost.forward - patches  # pixels have no gradient


def test_vit_e_has_the_operations_of_its_parameters():
    """2 operations a weight and token, and attention: 63 of 64 blocks of 1025 tokens."""
    config = preset("infimm_hd_13b")
    config.vision_config.set_input_size(448)
    window = StepFlops(config, ("gated_cross_attention",)).vision_encoder
    weights = 63 * (4 * 1792**2 + 2 * 1792 * 15360) + 1792 * 3 * 14**2
    assert window.forward == 2 * 1025 * weights + 63 * 4 * 1025**2 * 1792 and window.backward == 0
