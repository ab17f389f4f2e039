"""Flamingo's rule "a text token sees the image immediately before it" as segments of packed tokens.

The text of every sample is cut at each `<image>` token. The piece that an `<image>` token starts has that
image's vision tokens as keys; the piece before the first one has no keys. So the mask needs no memory and a
varlen attention needs no mask. See Alayrac et al. 2022, section 2.4, for the rule. Without it a piece has the
vision tokens of all images of its sample up to its own, a range too, and ranges overlap.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels import checks

MAX_TOKENS = torch.iinfo(torch.int32).max


class MediaSegments(NamedTuple):
    """The segments of a batch: one leading segment per sample and one per image, samples in order.

    cu_seqlens_q, cu_seqlens_k: int32 [batch + num_images + 1], cumulative lengths in the flattened text
    [batch * text_len] and in the packed vision tokens. text_mask: bool [batch, text_len], False for text
    before any image of its sample.

    segment_key_ranges, segment_query_ranges: int32 [batch + num_images, 2], None where a text token sees one
    image alone; else the (first, end) of the vision tokens that the text of a segment sees, and of the text
    that sees the vision tokens of a segment.

    Of `decode_segments` alone, for the kernels of few queries: key_ranges, int32 [batch, 2], are the (first,
    end) of each sample's keys in the packed vision tokens, (0, 0) where it has none. max_keys, the longest
    range, is a hint: a wrong one costs time, and changes a result by no more than its rounding.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    text_mask: Tensor
    segment_key_ranges: Tensor | None = None
    segment_query_ranges: Tensor | None = None
    key_ranges: Tensor | None = None
    max_keys: int = 0


def media_segments(
    media_locations: Tensor,
    vision_seqlens: Sequence[int] | Tensor,
    images_per_sample: Sequence[int] | Tensor,
    *,
    only_attend_immediate_media: bool = True,
) -> MediaSegments:
    """Cut a batch of texts at its `<image>` tokens. Made once per batch and shared by every layer.

    Args:
        media_locations: bool [batch, text_len], True at `<image>` tokens. Its values are read: a CUDA tensor
            is waited for, so hand over the CPU copy where there is one.
        vision_seqlens: [num_images], the number of vision tokens of each image, in order of appearance.
        images_per_sample: [batch].
        only_attend_immediate_media: False lets a text token see all images of its sample before it, instead
            of the last one alone.

    Returns:
        MediaSegments on the device of media_locations. Each sample gives a leading segment without keys (of
        no length when the text starts with `<image>`) and a segment per image, from its `<image>` token to
        the next one or to the end of the sample.

    Raises:
        ValueError: an argument breaks a rule above; or a sample has more or fewer `<image>` tokens than
            images.
    """
    checks.tensor("media_locations", media_locations, 2, "[batch, text_len]")
    if media_locations.dtype != torch.bool:
        checks.fail("media_locations", "have dtype torch.bool", media_locations.dtype)
    checks.flag("only_attend_immediate_media", only_attend_immediate_media)
    device = media_locations.device
    if device.type == "meta":
        checks.fail("media_locations", "be on a CPU or CUDA device, its values are read", device)
    batch, text_len = media_locations.shape
    if batch * text_len > MAX_TOKENS:
        checks.fail("media_locations", f"hold at most {MAX_TOKENS} tokens (int32)", batch * text_len)
    lengths, images = _counts(vision_seqlens, images_per_sample)
    if len(images) != batch:
        checks.fail("images_per_sample", f"have one entry per sample ({batch})", len(images))
    locations = media_locations.cpu()
    for sample, (found, expected) in enumerate(zip(locations.sum(1).tolist(), images.tolist(), strict=True)):
        if found != expected:
            checks.fail(
                "media_locations",
                f"mark one token per image in sample {sample} ({expected} images)",
                f"{found} tokens",
            )
    sample_starts = torch.arange(batch, device="cpu") * text_len
    starts = torch.cat((sample_starts, locations.flatten().nonzero().squeeze(1)))
    # Stable: where a sample starts with <image>, its empty leading segment stays in front.
    starts, order = starts.sort(stable=True)
    num_keys = torch.cat((torch.zeros(batch, dtype=torch.int64, device="cpu"), lengths))[order]
    cu_seqlens_q = torch.cat((starts, torch.tensor([batch * text_len], device="cpu"))).to(torch.int32)
    cu_seqlens_k = _cumulative("vision_seqlens", num_keys)
    ranges = () if only_attend_immediate_media else _overlapping_ranges(cu_seqlens_q, cu_seqlens_k, images)
    return MediaSegments(
        cu_seqlens_q.to(device),
        cu_seqlens_k.to(device),
        media_locations.cumsum(1) > 0,
        *(r.to(device) for r in ranges),
    )


def decode_segments(
    vision_seqlens: Sequence[int] | Tensor,
    images_per_sample: Sequence[int] | Tensor,
    *,
    text_len: int = 1,
    only_attend_immediate_media: bool = True,
    device: torch.device | str | None = None,
) -> MediaSegments:
    """The segments of generated text: every sample's `text_len` new tokens see that sample's last image.

    Earlier images stay as segments without queries, so the packed vision tokens are those of
    `media_segments`. A sample without an image has keyless queries.

    Args:
        vision_seqlens, images_per_sample: as in `media_segments`.
        text_len: new tokens per sample.
        only_attend_immediate_media: False lets them see all images of their sample.
        device: of the result; the CPU when None.

    Raises:
        ValueError: an argument breaks a rule above.
    """
    if not isinstance(text_len, int) or isinstance(text_len, bool) or text_len < 0:
        checks.fail("text_len", "be a non-negative integer", text_len)
    checks.flag("only_attend_immediate_media", only_attend_immediate_media)
    lengths, images = _counts(vision_seqlens, images_per_sample)
    batch = len(images)
    leading = (
        images.cumsum(0) - images + torch.arange(batch, device="cpu")
    )  # index of each sample's leading segment
    num_keys = torch.zeros(batch + len(lengths), dtype=torch.int64, device="cpu")
    is_image = torch.ones(len(num_keys), dtype=torch.bool, device="cpu")
    is_image[leading] = False
    num_keys[is_image] = lengths
    num_queries = torch.zeros_like(num_keys)
    num_queries[leading + images] = text_len
    cu_seqlens_q, cu_seqlens_k = (
        _cumulative("text_len", num_queries),
        _cumulative("vision_seqlens", num_keys),
    )
    # The segment of a sample's queries is its last image, or its leading one: (first, end) with end == first.
    last = leading + images
    first = last if only_attend_immediate_media else leading
    key_ranges = torch.stack((cu_seqlens_k[first], cu_seqlens_k[last + 1]), 1)
    key_counts = key_ranges[:, 1] - key_ranges[:, 0]
    ranges = (None, None)
    if not only_attend_immediate_media:
        ranges = (r.to(device) for r in _overlapping_ranges(cu_seqlens_q, cu_seqlens_k, images))
    return MediaSegments(
        cu_seqlens_q.to(device),
        cu_seqlens_k.to(device),
        (images > 0).unsqueeze(1).repeat(1, text_len).to(device),
        *ranges,
        key_ranges=key_ranges.masked_fill_(key_counts.unsqueeze(1) == 0, 0).to(device),
        max_keys=int(key_counts.max()) if batch else 0,
    )


def _overlapping_ranges(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """segment_key_ranges and segment_query_ranges: from a sample's first key on, to its last query."""
    counts = images + 1
    ends = counts.cumsum(0)
    first, end = (x.repeat_interleave(counts) for x in (ends - counts, ends))
    return (
        torch.stack((cu_seqlens_k[first], cu_seqlens_k[1:]), 1),
        torch.stack((cu_seqlens_q[:-1], cu_seqlens_q[end]), 1),
    )


def _counts(
    vision_seqlens: Sequence[int] | Tensor, images_per_sample: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    lengths, images = (
        _integers("vision_seqlens", vision_seqlens),
        _integers("images_per_sample", images_per_sample),
    )
    if int(images.sum()) != len(lengths):
        checks.fail("vision_seqlens", f"have one entry per image ({int(images.sum())})", len(lengths))
    return lengths, images


def _integers(argument: str, values: Sequence[int] | Tensor) -> Tensor:
    """A 1-D int64 CPU tensor of non-negative integers."""
    try:
        result = values.cpu() if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        checks.fail(argument, "be a sequence of integers", values)
    if result.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    if result.dim() != 1 or result.is_floating_point() or result.is_complex() or result.dtype == torch.bool:
        checks.fail(argument, "be a sequence of integers", values)
    if int(result.min()) < 0:
        checks.fail(argument, "hold no negative number", int(result.min()))
    return result.long()


def _cumulative(argument: str, lengths: Tensor) -> Tensor:
    total = sum(lengths.tolist())
    if total > MAX_TOKENS:
        checks.fail(argument, f"count at most {MAX_TOKENS} tokens in all (int32)", total)
    result = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cpu")
    torch.cumsum(lengths, 0, dtype=torch.int32, out=result[1:])
    return result
