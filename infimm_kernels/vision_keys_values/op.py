"""vision_keys_values: the public function and its registered op."""

import torch
from torch import Tensor

from infimm_kernels import autodiff, backends, checks
from infimm_kernels.position_2d.op import GRANULARITIES, check_positions
from infimm_kernels.vision_keys_values import reference


def vision_keys_values(
    features: Tensor,
    weight: Tensor,
    *,
    num_heads: int,
    positions: Tensor | None = None,
    granularity: str = "window",
    window_shape: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    backend: str | None = None,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The keys and values of all cross-attention layers, projected from the same vision features.

        key_l = (features + PE) @ weight[l, 0]^T,  value_l = (features + PE) @ weight[l, 1]^T

    Layers that attend to the same features (Alayrac et al. 2022, Flamingo) share one product. PE is the
    encoding of `add_position_2d`. A product is linear and the encoding separable, so on a GPU PE @ weight^T
    is a small table of columns and one of rows, added to the product's result: no pass over the features.

    Args:
        features: [num_windows, seqlen, hidden], float16, bfloat16, float32 or float64.
        weight: [num_layers, 2, inner, hidden], for each layer the keys' and the values' weight in the layout
            of torch.nn.Linear; dtype and device of features.
        num_heads: heads of every layer; inner = num_heads * head_dim.
        positions: int32 or int64 [num_windows, 2], (row, column) of each window, on the device of features;
            or None to add nothing. hidden % 4 == 0 with them.
        granularity, window_shape, num_prefix_tokens: what the positions mean, as in `add_position_2d`;
            without positions they change nothing.
        backend: "reference" or "triton"; None chooses. See `infimm_kernels.backends`.

    Returns:
        num_layers pairs (key, value), each [num_windows * seqlen, num_heads, head_dim] in the dtype of
        features: contiguous parts of one tensor. Sums are in float32 at least, and equal those of adding the
        position first but for rounding (and for an inf in weight, which a position may turn into NaN).

    The backward keeps the inputs alone, and computes the gradient of features or of weight only when it is
    wanted. Under autocast both are cast to its dtype. Forward-mode AD, torch.func transforms and the backward
    of the backward run a plain PyTorch version.

    Raises:
        ValueError: an argument breaks a rule above, or the named backend cannot run.
        NotImplementedError: no GPU backend can serve the call.
    """
    checks.tensor("features", features, 3, "[num_windows, seqlen, hidden]")
    checks.tensor("weight", weight, 4, "[num_layers, 2, inner, hidden]")
    features, weight = autodiff.to_autocast_dtype(features, weight)
    checks.floating("features", features)
    checks.same_kind("weight", weight, "features", features)
    num_layers, num_projections, inner, hidden = weight.shape
    if num_projections != 2:
        checks.fail("weight", "have 2 as its second dimension, keys and values", list(weight.shape))
    if num_layers < 1 or inner < 1 or hidden < 1:
        checks.fail("weight", "have at least one layer, one row and one column", list(weight.shape))
    if features.shape[2] != hidden:
        checks.fail("features", f"have the hidden size of weight ({hidden})", list(features.shape))
    if not checks.is_int(num_heads) or num_heads < 1 or inner % num_heads:
        checks.fail("num_heads", f"be a positive integer that divides inner ({inner})", num_heads)
    height, width = 1, 1
    if positions is not None:
        height, width = check_positions(
            "features", features, positions, granularity, window_shape, num_prefix_tokens
        )
    else:
        if granularity not in GRANULARITIES:
            checks.fail("granularity", "be 'window' or 'token'", repr(granularity))
        checks.prefix_tokens(num_prefix_tokens)
    backends.check(backend)
    kv = _call(features, weight, positions, granularity, height, width, num_prefix_tokens, backend)
    # One unbind, whose backward is one stack; indexing would add up a gradient of full size per part.
    parts = kv.flatten(0, 1).unflatten(-1, (num_heads, inner // num_heads)).unbind(0)
    return tuple(zip(parts[::2], parts[1::2], strict=True))


_library = torch.library.Library("infimm_kernels", "FRAGMENT")
_PLACE = (
    "Tensor? positions, str granularity, SymInt window_height, SymInt window_width, int num_prefix_tokens,"
    " str? backend"
)
_library.define(f"vision_keys_values(Tensor features, Tensor weight, {_PLACE}) -> Tensor")
_library.define(
    "vision_keys_values_backward_features(Tensor dkv, Tensor weight, str? backend) -> Tensor dfeatures"
)
_library.define(
    f"vision_keys_values_backward_weight(Tensor dkv, Tensor features, {_PLACE}) -> Tensor dweight"
)


# --- kernel choice ------------------------------------------------------------------------------------------


CANDIDATES = (backends.Candidate("triton", backends.why_not_triton),)


def _is_triton(backend: str | None, *tensors: Tensor) -> bool:
    return backends.select("vision_keys_values", CANDIDATES, backend, *tensors) == "triton"


@autodiff.without_autocast
def _kernel(
    features, weight, positions, granularity, window_height, window_width, num_prefix_tokens, backend
):
    place = (positions, granularity, (window_height, window_width), num_prefix_tokens)
    if _is_triton(backend, features, weight):
        from infimm_kernels.vision_keys_values.triton_forward import launch_vision_keys_values

        return launch_vision_keys_values(features, weight, *place)
    return reference.forward(features, weight, *place)


@autodiff.without_autocast
def _backward_features_kernel(dkv, weight, backend):
    if _is_triton(backend, dkv, weight):
        from infimm_kernels.vision_keys_values.triton_backward import launch_backward_features

        return launch_backward_features(dkv, weight)
    return reference.backward_features(dkv, weight)


@autodiff.without_autocast
def _backward_weight_kernel(
    dkv, features, positions, granularity, window_height, window_width, num_prefix_tokens, backend
):
    place = (positions, granularity, (window_height, window_width), num_prefix_tokens)
    if _is_triton(backend, dkv, features):
        from infimm_kernels.vision_keys_values.triton_backward import launch_backward_weight

        return launch_backward_weight(dkv, features, *place)
    return reference.backward_weight(dkv, features, *place)


for _device in ("CPU", "CUDA"):
    _library.impl("vision_keys_values", _kernel, _device)
    _library.impl("vision_keys_values_backward_features", _backward_features_kernel, _device)
    _library.impl("vision_keys_values_backward_weight", _backward_weight_kernel, _device)


# --- fake ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("infimm_kernels::vision_keys_values", lib=_library)
def _fake(features, weight, *place):
    return features.new_empty((*weight.shape[:2], features.shape[0] * features.shape[1], weight.shape[2]))


@torch.library.register_fake("infimm_kernels::vision_keys_values_backward_features", lib=_library)
def _backward_features_fake(dkv, weight, backend):
    return weight.new_empty((dkv.shape[2], weight.shape[3]))


@torch.library.register_fake("infimm_kernels::vision_keys_values_backward_weight", lib=_library)
def _backward_weight_fake(dkv, features, *place):
    return features.new_empty((*dkv.shape[:2], dkv.shape[3], features.shape[2]))


# --- autograd -----------------------------------------------------------------------------------------------


def _reference(
    features, weight, positions, granularity, window_height, window_width, num_prefix_tokens, backend
):
    place = (positions, granularity, (window_height, window_width), num_prefix_tokens)
    return reference.differentiable(features, weight, *place)


@autodiff.transforms_go_to(_reference)
def _call(*args):
    return torch.ops.infimm_kernels.vision_keys_values.default(*args)


def _setup_context(ctx, inputs, output):
    features, weight, positions, *ctx.options = inputs
    ctx.save_for_backward(features, weight, positions)


def _autograd(ctx, dkv):
    features, weight, positions = ctx.saved_tensors
    if torch.is_grad_enabled():

        def keys_values(features, weight):
            return _reference(features, weight, positions, *ctx.options)

        grads = autodiff.differentiable_backward(keys_values, (features, weight), (dkv,))
        return *grads, *(None,) * 6
    ops = torch.ops.infimm_kernels
    dfeatures = dweight = None
    if ctx.needs_input_grad[0]:
        backend = ctx.options[-1]
        dfeatures = ops.vision_keys_values_backward_features.default(dkv, weight, backend).view_as(features)
    if ctx.needs_input_grad[1]:
        dweight = ops.vision_keys_values_backward_weight.default(dkv, features, positions, *ctx.options)
    return dfeatures, dweight, *(None,) * 6


torch.library.register_autograd(
    "infimm_kernels::vision_keys_values", _autograd, setup_context=_setup_context, lib=_library
)
