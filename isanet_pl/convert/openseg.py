"""The authors' checkpoints (openseg.pytorch)."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isanet_pl.convert.files import check_config, find, read_pth, state_dict_of, whole_number
from isanet_pl.convert.layout import Rules, build, rename
from isanet_pl.convert.trained import DATA_SETS, Trained, find_classes
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet

# What a file may say about its backbone that the tensors do not; ours is like this.
BACKBONE = {"stride": 8, "multi_grid": [1, 1, 1]}
MEAN = (102.9801, 115.9465, 122.7717)  # BGR; they do not divide
NETWORK: dict[str, Any] = {
    "dropout": 0.05,
    "value_bias": False,
    "context_first": False,
    "ceil_mode": True,
}
INPLACE_ABN_SLOPE = 0.01
INPLACE_ABN_EPS = 1e-5


def rules_of(inplace_abn: bool) -> Rules:
    """Returns how our names become theirs.

    Args:
        inplace_abn: BatchNorm and activation are one layer, InPlaceABN. Else the two are a
            Sequential, in the head though not in the backbone.
    """
    norm = "" if inplace_abn else "0."
    return (
        (r"^backbone\.net\.conv1\.0\.", "backbone.resinit.conv1."),
        (r"^backbone\.net\.conv1\.1\.", "backbone.resinit.bn1."),
        (r"^backbone\.net\.conv1\.3\.", "backbone.resinit.conv2."),
        (r"^backbone\.net\.conv1\.4\.", "backbone.resinit.bn2."),
        (r"^backbone\.net\.conv1\.6\.", "backbone.resinit.conv3."),
        (r"^backbone\.net\.bn1\.", "backbone.resinit.bn3."),
        (r"^backbone\.net\.", "backbone."),
        (r"^reduce\.0\.", "isa_head.0."),
        (r"^reduce\.1\.", f"isa_head.1.{norm}"),
        (r"^context\.", "isa_head.2."),
        (r"\.(f_key|f_query|W|up_conv|conv_bn)\.1\.", rf".\1.1.{norm}"),
        (r"\.(f_key|f_query)\.3\.", r".\1.2."),
        (r"\.(f_key|f_query)\.4\.", rf".\1.3.{norm}"),
        (r"^classifier\.", "cls_head."),
        (r"^aux_head\.0\.", "dsn_head.0."),
        (r"^aux_head\.1\.", f"dsn_head.1.{norm}"),
        (r"^aux_head\.4\.", "dsn_head.3."),
    )


def read_openseg(
    path: Path, data_set: str | None = None, align_corners: bool | None = None
) -> Trained:
    """Returns the ISANet of a checkpoint of openseg.pytorch, with InPlaceABN or BatchNorm.

    Args:
        path: The file.
        data_set: Whose classes these are, a key of DATA_SETS; None: the file says.
        align_corners: Of the upsampling; None: true, as all of theirs.

    Raises:
        InputError: The file holds no such network exactly, or does not say all that is needed.
    """
    content = read_pth(path)
    state = state_dict_of(content, path)
    config = find(content, "config_dict")
    check_config(find(config, "network"), BACKBONE, path)
    inplace_abn = "isa_head.1.weight" in state
    rules = rules_of(inplace_abn)
    for conv, norm in (("isa_head.0", "reduce.1"), ("dsn_head.0", "aux_head.1")):
        _fold_bias(state, f"{conv}.bias", rename(f"{norm}.running_mean", rules))
    network = build(
        state,
        rules,
        path,
        **_pixels(config),
        down_factors=[tuple(f) for f in find(config, "network", "factors", default=[(8, 8)])],
        align_corners=align_corners is not False,
        negative_slope=INPLACE_ABN_SLOPE if inplace_abn else 0.0,
        **NETWORK,
    )
    if inplace_abn:
        _take_absolute_scales(network)
    stored = str(find(config, "dataset"))
    data_set = data_set or (stored if stored in DATA_SETS else None)
    classes = find_classes(network.arguments["num_classes"], path, data_set)
    network.inference = Inference(pad_multiple=1, mirrored_classes=classes.mirrored)
    return Trained(network, classes, whole_number(find(config, "iters")))


def _pixels(config: Any) -> dict[str, Any]:
    """Returns how the network's input is made of pixels: `bgr`, `mean`, `std`; see `build`."""
    pixels = find(config, "normalize")
    divisor = find(pixels, "div_value", default=1)
    return {
        "bgr": find(config, "data", "input_mode", default="BGR") == "BGR",
        "mean": [divisor * value for value in find(pixels, "mean", default=MEAN)],
        "std": [divisor * value for value in find(pixels, "std", default=(1, 1, 1))],
    }


def _fold_bias(state: dict[str, Tensor], bias: str, running_mean: str) -> None:
    """Moves the bias of a convolution, which old versions have, into the BatchNorm behind it."""
    if bias in state and running_mean in state and state[bias].shape == state[running_mean].shape:
        state[running_mean] = state[running_mean] - state.pop(bias)


def _take_absolute_scales(network: ISANet) -> None:
    """Gives every BatchNorm the scale that InPlaceABN makes of its weight: |weight| + eps."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = module.weight.data.abs() + INPLACE_ABN_EPS
