"""Attention of a few new tokens to cached keys and values, projection, gate and residual, in eager PyTorch.

    y = x + tanh(gate) * (softmax(scale q k^T) v @ out_weight^T)      a sample without keys: y = x

One query row per head reads every key and value once and multiplies each number once, so memory decides its
time, and with rows of all heads next to each other (what a projection writes) a product per head walks them
with gaps. There scores are made for all heads of a few keys at a time in float32, and the weighted sum of
values is the one of an embedding bag, whose table is the rows of v.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from infimm_kernels.attention import reference as attention
from infimm_kernels.attention.plan import uniform_plan
from infimm_kernels.autodiff import compute_dtype
from infimm_kernels.gated_residual import reference as gated_residual

# Products of q and k that are made at once: they stay in the cache until they are summed.
CHUNK = 1 << 20
# With fewer keys the calls cost more than the gaps.
FEW_KEYS = 512


class Run(NamedTuple):
    """Neighbouring samples with equally many keys each, one's keys right behind those of the other."""

    first_sample: int
    num_samples: int
    first_key: int
    num_keys: int


def forward(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    attn_gate: Tensor,
    key_ranges: Tensor,
    softmax_scale: float,
) -> Tensor:
    """x [batch, text_len, hidden], query [batch, text_len, num_heads, head_dim], key, value
    [total, num_kv_heads, head_dim], key_ranges [batch, 2] -> like x. Reads key_ranges. Neighbouring channels
    of query, key and value are neighbours in memory."""
    batch, text_len = query.shape[:2]
    runs = list(_runs(key_ranges.tolist(), key.shape[0]))
    has_keys = torch.zeros((batch, 1), dtype=torch.bool)
    out = query.new_zeros(query.shape)
    for run in runs:
        samples = slice(run.first_sample, run.first_sample + run.num_samples)
        keys = slice(run.first_key, run.first_key + run.num_samples * run.num_keys)
        has_keys[samples] = True
        out[samples] = _attend(query[samples], key[keys], value[keys], softmax_scale, run.num_keys)
    row_mask = None if bool(has_keys.all()) else has_keys.expand(batch, text_len).to(x.device)
    y = gated_residual.forward(x, out.flatten(2), out_weight, attn_gate, row_mask)
    return y.contiguous()


def _runs(ranges: list[list[int]], total: int) -> Iterator[Run]:
    """Samples that have keys, those that can share a call together; ranges are cut to the keys there are."""
    run = None
    for sample, bounds in enumerate(ranges):
        first, end = (min(max(bound, 0), total) for bound in bounds)
        if end <= first:
            continue
        if run is not None:
            follows = sample == run.first_sample + run.num_samples
            next_key = run.first_key + run.num_samples * run.num_keys
            if follows and (first, end - first) == (next_key, run.num_keys):
                run = run._replace(num_samples=run.num_samples + 1)
                continue
            yield run
        run = Run(sample, 1, first, end - first)
    if run is not None:
        yield run


def _attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, num_keys: int) -> Tensor:
    """query [samples, text_len, heads, head_dim], key and value those of all samples -> like query."""
    samples, text_len, num_heads, head_dim = query.shape
    lone_rows = text_len == 1 and num_heads == key.shape[1] and num_keys >= FEW_KEYS
    if lone_rows and query.device.type == "cpu" and query.dtype != torch.float64 and _is_table(key, value):
        weights = _scores(query, key, num_keys).mul_(softmax_scale)
        torch.softmax(weights, -1, out=weights)
        return _weighted_sums(weights.to(value.dtype), value).view(query.shape)
    plan = uniform_plan(samples, text_len, num_keys)
    out, _ = attention.forward(query.flatten(0, 1), key, value, softmax_scale, plan)
    return out.view(query.shape)


def _scores(query: Tensor, key: Tensor, num_keys: int) -> Tensor:
    """query [samples, 1, heads, head_dim], key [samples * num_keys, heads, head_dim] -> q k^T, float32
    [samples, heads, num_keys]."""
    samples, _, num_heads, head_dim = query.shape
    dtype = compute_dtype(query.dtype)
    query = query.to(dtype)
    scores = query.new_empty((samples, num_heads, num_keys))
    chunk_keys = min(num_keys, max(1, CHUNK // (num_heads * head_dim)))
    products = query.new_empty((chunk_keys, num_heads, head_dim))
    for i in range(samples):
        keys = key[i * num_keys : (i + 1) * num_keys]
        for chunk, target in zip(keys.split(chunk_keys), scores[i].split(chunk_keys, 1), strict=True):
            product = products[: chunk.shape[0]]
            torch.sum(torch.mul(chunk, query[i], out=product), -1, out=target.t())
    return scores


def _is_table(key: Tensor, value: Tensor) -> bool:
    """Whether heads lie next to each other in every token, those of value as rows of a table without gaps."""
    width, (token, head, _) = value.shape[2], value.stride()
    return head == width and token >= width and token % width == 0 and key.stride(1) <= key.stride(0)


def _weighted_sums(weights: Tensor, value: Tensor) -> Tensor:
    """weights [samples, heads, num_keys], value [samples * num_keys, heads, head_dim] -> [samples, heads,
    head_dim], the sums over the keys of each sample."""
    samples, num_heads, num_keys = weights.shape
    head_dim = value.shape[2]
    token = value.stride(0) // head_dim  # rows of the table from one token to the next
    rows = _rows(num_heads, num_keys, token)
    sums = weights.new_empty((samples, num_heads, head_dim))
    for i in range(samples):
        first = value[i * num_keys]
        table = first.as_strided(((num_keys - 1) * token + num_heads, head_dim), (head_dim, 1))
        sums[i] = torch.nn.functional.embedding_bag(rows, table, per_sample_weights=weights[i], mode="sum")
    return sums


@functools.lru_cache(maxsize=4)  # the same for every layer of a step, and for the steps after it
def _rows(num_heads: int, num_keys: int, token: int) -> Tensor:
    """Where the rows of each head lie in the table, [heads, num_keys]."""
    return torch.arange(0, num_keys * token, token) + torch.arange(num_heads).unsqueeze(1)
