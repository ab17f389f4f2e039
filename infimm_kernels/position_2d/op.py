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
        backend: "reference", "triton" or "cuda"; None chooses. See `infimm_kernels.backends`.

    Returns:
        a new tensor of the shape and dtype of x. Its gradient with respect to x is the identity. Autocast
        leaves the op alone, as it leaves an addition.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("x", x, 3, "[num_windows, seqlen, hidden]")
    checks.floating("x", x)
    num_windows, seqlen, hidden = x.shape
    if hidden < 4 or hidden % 4:
        checks.fail("x", "have a hidden size that is a positive multiple of 4", list(x.shape))
    checks.tensor("positions", positions, 2, "[num_windows, 2]")
    if positions.dtype not in (torch.int32, torch.int64):
        checks.fail("positions", "have dtype torch.int32 or torch.int64", positions.dtype)
    checks.same_device("positions", positions, "x", x)
    checks.shape("positions", positions, (num_windows, 2), "[num_windows, 2]")
    if granularity not in GRANULARITIES:
        checks.fail("granularity", "be 'window' or 'token'", repr(granularity))
    checks.prefix_tokens(num_prefix_tokens)
    if num_prefix_tokens > seqlen:
        checks.fail(
            "num_prefix_tokens", f"be at most the number of tokens of a window ({seqlen})", num_prefix_tokens
        )
    height, width = 1, 1
    if granularity == "token":
        height, width = _window_shape(window_shape, seqlen - num_prefix_tokens)
    backends.check(backend)
    return _call(x, positions, granularity, height, width, num_prefix_tokens, backend)


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


def _kernel(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend):
    window_shape = (window_height, window_width)
    chosen = backends.select("add_position_2d", CANDIDATES, backend, x, positions)
    if chosen == "cuda":
        from infimm_kernels.position_2d.cuda import launch_add_position_2d
    elif chosen == "triton":
        from infimm_kernels.position_2d.triton_forward import launch_add_position_2d
    else:
        return reference.forward(x, positions, granularity, window_shape, num_prefix_tokens).contiguous()
    return launch_add_position_2d(x, positions, granularity, window_shape, num_prefix_tokens)


for _device in ("CPU", "CUDA"):
    _library.impl("add_position_2d", _kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::add_position_2d", lib=_library)
def _fake(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend):
    return x.new_empty(x.shape)


# --- autograd -----------------------------------------------------------------------------------------------


def _reference(x, positions, granularity, window_height, window_width, num_prefix_tokens, backend):
    return reference.forward(x, positions, granularity, (window_height, window_width), num_prefix_tokens)


@autodiff.transforms_go_to(_reference)
def _call(*args):
    return torch.ops.infimm_kernels.add_position_2d.default(*args)


def _autograd(ctx, dy):
    return dy, None, None, None, None, None, None


torch.library.register_autograd("infimm_kernels::add_position_2d", _autograd, lib=_library)
