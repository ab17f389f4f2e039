"""add_position_2d: the public function and its registered op."""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.position_2d import reference

GRANULARITIES = ("window", "token")


def add_position_2d(
    x: Tensor,
    positions: Tensor,
    *,
    granularity: str = "window",
    window_shape: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add the two-dimensional sinusoidal encoding of each window's place in its image to its features.

        PE(x, y)[2k] = sin(x / 10000^(4k / D)),  PE(x, y)[2k + 1] = cos(x / 10000^(4k / D)),  k = 0 .. D/4 - 1

    and the same with y in the second half of the D = hidden channels (Wang & Liu 2021, "Translating math
    formula images to LaTeX sequences using deep neural networks with sequence-level training"; x is the
    column, y the row).

    Args:
        x: [num_windows, seqlen, hidden], float16, bfloat16, float32 or float64; hidden % 4 == 0.
        positions: int32 or int64 [num_windows, 2] on the device of x: (row, column) of each window in its
            image's grid of windows. A negative row or column means "no position" (the thumbnail): the window
            is copied unchanged.
        granularity: "window" adds PE(column, row) to every token of the window, the prefix tokens included.
            "token" adds PE(column * w + j, row * h + i) to the patch (i, j) of the window, and nothing to the
            prefix tokens.
        window_shape: (h, w), in patches, for "token"; None takes the square of that many patches. Ignored by
            "window".
        num_prefix_tokens: 0 to 8 tokens (CLS) in front of the patches of each window.
        out: a tensor to write into, with the shape, dtype and device of x: x itself, which is then changed in
            place, or one that ends before x begins or begins after x ends in memory; torch.compile does not
            look. As with torch's out=, there is no gradient then.
        backend: "reference", "triton" or "cuda"; None chooses. See `infimm_kernels.backends`.

    Returns:
        a new tensor of the shape and dtype of x, or `out`. Its gradient with respect to x is the identity.
        Autocast leaves the op alone, as it leaves an addition.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("x", x, 3, "[num_windows, seqlen, hidden]")
    checks.floating("x", x)
    height, width = check_positions("x", x, positions, granularity, window_shape, num_prefix_tokens)
    backends.check(backend)
    if out is None:
        return _call(x, positions, granularity, height, width, num_prefix_tokens, backend)
    _check_out(out, x, positions)
    torch.ops.infimm_kernels.add_position_2d_out.default(
        x, positions, granularity, height, width, num_prefix_tokens, backend, out
    )
    return out


def _check_out(out: object, x: Tensor, positions: Tensor) -> None:
    checks.tensor("out", out)
    checks.same_kind("out", out, "x", x)
    checks.shape("out", out, x.shape, "the shape of x")
    if autodiff.transforms_active():
        checks.fail("out", "be None under forward-mode AD and torch.func transforms", "a tensor")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        checks.fail("out", "be None where x or out requires a gradient", "a tensor")
    if torch.compiler.is_compiling() or out.device.type == "meta":
        return  # no addresses there; a compiled call writes as if out and x were apart
    if out is not x and (out.data_ptr(), out.stride()) != (x.data_ptr(), x.stride()) and _overlap(out, x):
        checks.fail("out", "be x itself or lie before or behind it in memory", "memory between its ends")
    if _overlap(out, positions):
        checks.fail("out", "be memory apart from positions", "memory that overlaps with positions")
    reach = 1
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < reach and out.numel():
            checks.fail("out", "have elements that do not overlap in memory", f"strides {list(out.stride())}")
        reach += (size - 1) * stride


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the first and last addresses of two tensors enclose a common one."""
    (a_start, a_end), (b_start, b_end) = map(_span, (a, b))
    return a_start < b_end and b_start < a_end


def _span(x: Tensor) -> tuple[int, int]:
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_positions(
    argument: str,
    x: Tensor,
    positions: object,
    granularity: object,
    window_shape: object,
    num_prefix_tokens: object,
) -> tuple[int, int]:
    """Check the places of the windows of x [num_windows, seqlen, hidden], which the caller calls `argument`.

    Returns:
        (h, w) of a window in patches for "token", (1, 1) for "window".
    """
    num_windows, seqlen, hidden = x.shape
    if hidden < 4 or hidden % 4:
        checks.fail(argument, "have a hidden size that is a positive multiple of 4", list(x.shape))
    checks.tensor("positions", positions, 2, "[num_windows, 2]")
    if positions.dtype not in (torch.int32, torch.int64):
        checks.fail("positions", "have dtype torch.int32 or torch.int64", positions.dtype)
    checks.same_device("positions", positions, argument, x)
    checks.shape("positions", positions, (num_windows, 2), "[num_windows, 2]")
    if granularity not in GRANULARITIES:
        checks.fail("granularity", "be 'window' or 'token'", repr(granularity))
    checks.prefix_tokens(num_prefix_tokens)
    if num_prefix_tokens > seqlen:
        checks.fail(
            "num_prefix_tokens", f"be at most the number of tokens of a window ({seqlen})", num_prefix_tokens
        )
    if granularity == "window":
        return 1, 1
    return _window_shape(window_shape, seqlen - num_prefix_tokens)


def _window_shape(window_shape: tuple[int, int] | None, num_patches: int) -> tuple[int, int]:
    if window_shape is None:
        side = 0
        while side * side < num_patches:  # math.isqrt cannot be traced
            side += 1
        if side * side != num_patches:
            checks.fail(
                "window_shape", f"be given when the number of patches ({num_patches}) is not a square", None
            )
        return side, side
    is_pair = isinstance(window_shape, (tuple, list)) and len(window_shape) == 2
    if not is_pair or not all(map(checks.is_int, window_shape)):
        checks.fail("window_shape", "be a pair of integers (h, w)", repr(window_shape))
    height, width = window_shape
    if height < 0 or width < 0 or height * width != num_patches:
        checks.fail("window_shape", f"hold the {num_patches} patches of a window", (height, width))
    return height, width


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_library.define(
    "add_position_2d(Tensor x, Tensor positions, str granularity, SymInt window_height, SymInt window_width,"
    " int num_prefix_tokens, str? backend) -> Tensor"
)
_library.define(
    "add_position_2d_out(Tensor x, Tensor positions, str granularity, SymInt window_height,"
    " SymInt window_width, int num_prefix_tokens, str? backend, Tensor(a!) out) -> ()"
)


# --- kernel choice ------------------------------------------------------------------------------------------


def why_not_cuda(x: Tensor, positions: Tensor) -> str | None:
    """Why the compiled extension cannot run this call; None when it can."""
    from infimm_kernels.position_2d import cuda

    return cuda.why_not_cuda(x, positions)


CANDIDATES = (
    backends.Candidate("triton", backends.why_not_triton),
    # Compiled but never yet run on hardware, so it has to be asked for.
    backends.Candidate("cuda", why_not_cuda, default=False),
)
OUT_CANDIDATES = (
    CANDIDATES[0],
    backends.Candidate("cuda", lambda *tensors: "it cannot write into out", default=False),
)


def _kernel(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend):
    place = (positions, granularity, (window_height, window_width), num_prefix_tokens)
    if backends.select("add_position_2d", CANDIDATES, backend, x, positions) == "cuda":
        from infimm_kernels.position_2d.cuda import launch_add_position_2d

        return launch_add_position_2d(x, *place)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _out_kernel(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend, out)
    return out


def _out_kernel(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend, out):
    place = (positions, granularity, (window_height, window_width), num_prefix_tokens)
    if backends.select("add_position_2d", OUT_CANDIDATES, backend, x, positions) == "triton":
        from infimm_kernels.position_2d.triton_forward import launch_add_position_2d

        launch_add_position_2d(out, x, *place)
    else:
        reference.add_into(out, x, *place)


for _device in ("CPU", "CUDA"):
    _library.impl("add_position_2d", _kernel, _device)
    _library.impl("add_position_2d_out", _out_kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::add_position_2d", lib=_library)
def _fake(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend):
    return x.new_empty(x.shape)


@torch.library.register_fake("infimm_kernels::add_position_2d_out", lib=_library)
def _out_fake(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend, out):
    return None


# --- autograd -----------------------------------------------------------------------------------------------


def _reference(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend):
    return reference.forward(x, positions, granularity, (window_height, window_width), num_prefix_tokens)


@autodiff.transforms_go_to(_reference)
def _call(*args):
    return torch.ops.infimm_kernels.add_position_2d.default(*args)


def _autograd(ctx, dy):
    return dy, None, None, None, None, None, None


torch.library.register_autograd("infimm_kernels::add_position_2d", _autograd, lib=_library)
