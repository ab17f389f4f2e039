"""The adapters of libraries that are not installed here, against stand-ins with the libraries' signatures."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import baselines
from bench.harness import Case, run_case

CPU = torch.device("cpu")
SHAPES = {
    "windows": ("window_attention", {"num_windows": 2, "seqlen": 5, "num_heads": 2, "head_dim": 16}),
    "ragged": ("window_attention", {"lengths": [3, 5, 4], "num_heads": 2, "head_dim": 16}),
    "grouped": (
        "varlen_attention",
        {"lengths_q": [3, 3], "lengths_k": [7, 7], "num_heads": 6, "num_kv_heads": 2, "head_dim": 16},
    ),
    "cross": (
        "varlen_attention",
        {"lengths_q": [3, 1], "lengths_k": [2, 7], "num_heads": 6, "num_kv_heads": 2, "head_dim": 16},
    ),
}


def dense(q, k, v):
    """[batch, seqlen, heads, head_dim]"""
    return baselines.eager(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def packed(q, k, v, lengths_q, lengths_k):
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([dense(*(x[None] for x in part))[0] for part in parts])


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert cu_seqlens_q.dtype == torch.int32
    assert [max(x) for x in lengths] == [max_seqlen_q, max_seqlen_k]
    return packed(q, k, v, *lengths)


class BlockDiagonalMask(SimpleNamespace):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        return cls(q=q_seqlen, k=kv_seqlen)


def memory_efficient_attention(query, key, value, attn_bias=None):
    """[batch, seqlen, heads, head_dim] or grouped [batch, seqlen, kv_heads, groups, head_dim]."""
    assert query.shape[2:-1] == key.shape[2:-1]
    groups = query.shape[3] if query.dim() == 5 else 1
    q, k, v = (x.flatten(2, 3) if groups > 1 else x for x in (query, key, value))
    if attn_bias is None:
        out = dense(q, k, v)
    else:
        assert len(q) == 1
        out = packed(q[0], k[0], v[0], attn_bias.q, attn_bias.k)[None]
    return out.unflatten(2, (-1, groups)) if groups > 1 else out


def flash(returns_lse: bool):
    def flash_attn_func(q, k, v, *, deterministic=False):
        out = dense(q, k, v)
        return (out, None) if returns_lse else out

    def flash_attn_varlen_func(q, k, v, *, deterministic=False, **lengths):
        out = varlen(q, k, v, **lengths)
        return (out, None) if returns_lse else out

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa=False):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


MODULES = {
    "flash_attn_2": {"flash_attn": flash(False)},
    "flash_attn_3": {"flash_attn_interface": flash(True)},
    "flash_attn_4": {"flash_attn": {}, "flash_attn.cute": flash(True)},
    "torch_varlen": {"torch.nn.attention.varlen": {"varlen_attn": varlen_attn}},
    "xformers": {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    },
}


@pytest.fixture
def libraries(monkeypatch):
    monkeypatch.setattr(baselines, "_need_cuda", lambda problem: None)

    def install(name: str):
        for module_name, attributes in MODULES[name].items():
            module = ModuleType(module_name)
            module.__dict__.update(attributes)
            monkeypatch.setitem(sys.modules, module_name, module)

    return install


def entry_of(name: str, shape: str, **changes) -> dict:
    op, fields = SHAPES[shape]
    implementation = next(x for x in baselines.ATTENTION if x.name == name)
    found = Case("test", op, fields, "float32", **changes)
    (entry,) = run_case(found, CPU, seconds=0.0, implementations=[implementation])
    return entry


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODULES)
def test_adapter_calls_the_library_as_it_wants_to_be_called(libraries, name, shape, backward):
    libraries(name)
    entry = entry_of(name, shape, backward=backward)
    if name == "torch_varlen" and shape in ("windows", "grouped"):
        assert (entry["status"], entry["reason"]) == (
            "missing",
            "the dense call of sdpa_flash runs the same kernel",
        )
    else:
        assert (entry["status"], entry["reason"]) == ("ok", None)


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_flash_attn_is_asked_for_determinism(libraries, monkeypatch, name):
    libraries(name)
    asked = []
    module = list(MODULES[name])[-1]

    def flash_attn_func(q, k, v, *, deterministic=False):
        asked.append(deterministic)
        return dense(q, k, v)

    monkeypatch.setattr(sys.modules[module], "flash_attn_func", flash_attn_func)
    assert entry_of(name, "windows", backward=True, deterministic=True)["status"] == "ok"
    assert asked and all(asked)


def test_a_library_that_breaks_on_import_is_missing_with_its_message(monkeypatch, tmp_path):
    """flash-attn built for another torch raises at import; that must not end the run."""
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = entry_of("flash_attn_3", "windows")
    assert entry["status"] == "missing"
    expected = "flash_attn_interface cannot be imported: OSError: undefined symbol: _ZN3c10"
    assert entry["reason"] == expected


@pytest.mark.long
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["flex_attention", "compiled_eager"])
def test_compiled_baselines(name, shape, backward):
    entry = entry_of(name, shape, backward=backward, compiled=True)
    if name == "compiled_eager" and shape in ("ragged", "cross"):
        assert entry["status"] == "missing"
    elif name == "flex_attention" and backward:  # PyTorch has no FlexAttention backward on the CPU
        assert entry["status"] == "failed" and "CPU" in entry["reason"]
    else:
        assert (entry["status"], entry["reason"]) == ("ok", None)
