"""From tensors under other names to a network of ours, all of them used and all of it filled."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from isanet_pl.errors import InputError, few
from isanet_pl.finite import first_not_finite
from isanet_pl.models import ISANet

Rules = Sequence[tuple[str, str]]
"""What turns a name of ours into theirs: patterns and replacements, one after the other."""

# Blocks of layer 3 and width of the deep stem tell the backbone.
BACKBONES = {
    (6, 32): "resnet50c",
    (23, 32): "resnet101c",
    (6, 64): "resnet50s",
    (23, 64): "resnet101s",
}
SHOWN = 20  # names in a message


def rename(name: str, rules: Rules) -> str:
    """Returns their name of a tensor of ours."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def build(
    state: Mapping[str, Tensor],
    rules: Rules,
    path: Path,
    bgr: bool,
    mean: Sequence[float],
    std: Sequence[float],
    **arguments: Any,
) -> ISANet:
    """Returns the network of reduced form with a file's weights, in eval mode, for RGB images.

    Args:
        state: The file's tensors, by their names.
        rules: How names of ours become theirs.
        path: The file, for messages.
        bgr: The file's network takes BGR; the one that is returned takes RGB all the same.
        mean: Mean in 0..255, in the order of the file's channels.
        std: Standard deviation in 0..255, in the order of the file's channels.
        arguments: What the tensors do not tell; see `ISANet`.

    Raises:
        InputError: The tensors are not exactly those of such a network.
    """
    arguments["mean"], arguments["std"] = (
        tuple(float(value) for value in (reversed(values) if bgr else values))
        for values in (mean, std)
    )
    network = ISANet(form="reduced", **sizes_of(state, rules, path), **arguments)
    fill(network, state, rules, path)
    if bgr:
        first = network.backbone.net.get_parameter("conv1.0.weight")
        first.data = first.data.flip(1)
    return network.eval()


def sizes_of(state: Mapping[str, Tensor], rules: Rules, path: Path) -> dict[str, Any]:
    """Returns the arguments of `ISANet` that the tensors of a file tell.

    Raises:
        InputError: The tensors that tell are not there, or the backbone is another one.
    """

    def width(name: str) -> int:
        key = rename(f"{name}.weight", rules)
        found = tuple(state[key].shape) if key in state else "not there"
        if len(found) != 4:
            raise InputError(
                f"{path} holds no ISANet in this layout: {key} should be the weight of a "
                f"convolution, but is {found}"
            )
        return int(found[0])

    blocks = {match[1] for key in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", key))}
    kind = (len(blocks), width("backbone.net.conv1.0"))
    if kind not in BACKBONES:
        known = ", ".join(f"{b} and {w} ({name})" for (b, w), name in BACKBONES.items())
        raise InputError(
            f"{path}: no known backbone has {kind[0]} blocks in layer3 and a stem of {kind[1]} "
            f"channels; known are {known}"
        )
    sizes = {
        "num_classes": width("classifier"),
        "backbone": BACKBONES[kind],
        "key_channels": width("context.stages.0.long_range_sa.f_key.0"),
        "value_channels": width("context.stages.0.long_range_sa.f_value"),
        "out_channels": width("reduce.0"),
        "aux_head": rename("aux_head.0.weight", rules) in state,
    }
    return sizes | ({"aux_channels": width("aux_head.0")} if sizes["aux_head"] else {})


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses tensors that are of no use.

    Raises:
        InputError: One has an element that is NaN or infinite.
    """
    wrong = first_not_finite(state)
    if wrong:
        raise InputError(f"{path}: {wrong} is not finite: a network with it computes nothing")


def fill(network: ISANet, state: Mapping[str, Tensor], rules: Rules, path: Path) -> None:
    """Loads a file's tensors into a network: all of them, and all that it has.

    BatchNorm's counters may be missing, as in files of old versions; they are then zero.

    Raises:
        InputError: A tensor is missing, left over, of another shape or not finite.
    """
    check_finite(state, path)
    own = network.state_dict()
    theirs = {name: rename(name, rules) for name in own}
    optional = {key for key in theirs.values() if key.endswith(".num_batches_tracked")}
    problems = {
        "missing": [k for k in theirs.values() if k not in state and k not in optional],
        "left over": sorted(state.keys() - theirs.values()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(own[name].shape)}"
            for name, key in theirs.items()
            if key in state and state[key].shape != own[name].shape
        ],
    }
    lines = [f"  {len(keys)} {kind}: {few(keys, SHOWN)}" for kind, keys in problems.items() if keys]
    if lines:
        raise InputError("\n".join([f"{path} does not hold exactly this network:", *lines]))
    network.load_state_dict({name: state.get(key, own[name]) for name, key in theirs.items()})
