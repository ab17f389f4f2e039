"""The parts of a start that no released weights have, connector and gated blocks, made module by module."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..config import InfiMMHDConfig
from ..connector import build_connector
from ..cross_attention import GatedCrossAttentionBlock, VisionKeysValues
from .checkpoint import Tensors


def fresh_tensors(config: InfiMMHDConfig, seed: int) -> Tensors:
    """Connector, keys and values, gated blocks as `InfiMMHD` makes them, the same for the same `seed`.

    A module is made when its first tensor is read and kept until another one's is."""
    vision_hidden, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    gated = config.gated_cross_attention
    width = vision_hidden if config.gated_layers else hidden
    modules: dict[str, Callable[[], nn.Module]] = {
        "connector": partial(build_connector, config.connector, vision_hidden, width)
    }
    if config.gated_layers:
        modules["vision_keys_values"] = partial(
            VisionKeysValues,
            len(config.gated_layers),
            vision_hidden,
            gated,
            config.position,
            config.num_prefix_tokens,
        )
    for layer in config.gated_layers:
        modules[f"gated_blocks.{layer}"] = partial(GatedCrossAttentionBlock, hidden, gated)

    made: dict[str, dict[str, Tensor]] = {}

    def read(module: str, name: str) -> Tensor:
        if module not in made:
            made.clear()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + list(modules).index(module))
                made[module] = modules[module]().state_dict()
        return made[module][name]

    tensors: Tensors = {}
    for module, make in modules.items():
        with torch.device("meta"):
            names = list(make().state_dict())
        tensors |= {f"{module}.{name}": partial(read, module, name) for name in names}
    return tensors
