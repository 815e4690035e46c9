"""Loading of weights files, whole or in part."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isanet_pl.errors import few

log = logging.getLogger(__name__)


def read_weights(path: str | Path) -> dict[str, Any]:
    """Returns the content of a weights file, on the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no weights file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights not found: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch do
        raise ValueError(
            f"{path} is not a PyTorch weights file, is truncated, or holds more than tensors, of "
            "which nothing was executed: give a state dict alone; a network of mmsegmentation or "
            "openseg becomes a checkpoint with scripts/convert_checkpoint.py"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict in a file's content: bare, or under `state_dict` or `model`."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], name: str, source: str
) -> frozenset[str]:
    """Copies what a state dict has for a module, logs what it lacks, and returns what was copied.

    Args:
        module: Takes the weights.
        state: Tensors by the module's names; any float dtype.
        name: Of the module, for messages.
        source: Where the weights come from, for messages.

    Raises:
        ValueError: Nothing in `state` has a name of the module, or a shape differs.
    """
    own = module.state_dict()
    shared = {k: v for k, v in state.items() if k in own}
    if not shared:
        raise ValueError(
            f"{source} holds no weight of {name}: there are {few(list(state), 3) or 'nothing'}, "
            f"wanted {few(list(own), 3)}"
        )
    for key, value in shared.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{source}: {key} is {tuple(value.shape)}, but {tuple(own[key].shape)} in {name}"
            )
    module.load_state_dict(shared, strict=False)
    missing = [k for k in own if k not in shared and not k.endswith("num_batches_tracked")]
    log.info(
        "%s: loaded %d tensors from %s; initialised anew: %s; not used: %s",
        name,
        len(shared),
        source,
        _by_part(missing),
        _by_part(k for k in state if k not in own),
    )
    return frozenset(shared)


def _by_part(names: Iterable[str]) -> str:
    """Returns counts such as "layer4 (29), fc (2)"."""
    parts = [name.split(".")[0] for name in names]
    return ", ".join(f"{p} ({parts.count(p)})" for p in dict.fromkeys(parts)) or "nothing"
