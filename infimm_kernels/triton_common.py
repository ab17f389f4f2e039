"""What the Triton kernels of several ops share."""

import torch
import triton
import triton.language as tl


@triton.jit
def tile_of_program(program, num_blocks_m, num_blocks_n, GROUP_M: tl.constexpr):
    """Tiles go down GROUP_M row blocks before the next column block, so a group shares its rows in L2."""
    programs_per_group = GROUP_M * num_blocks_n
    first_m = (program // programs_per_group) * GROUP_M
    group_m = tl.minimum(num_blocks_m - first_m, GROUP_M)
    in_group = program % programs_per_group
    return first_m + in_group % group_m, in_group // group_m


def rows_per_sum(dtype: torch.dtype) -> int:
    """After how many rows a product of factors of this dtype begins a new sum; 0 for one sum over all rows.

    In float32 the rounding of a single running sum over many rows is more than eager PyTorch's; that of
    16-bit factors outweighs it. A multiple of every tile's depth.
    """
    return 512 if dtype == torch.float32 else 0
