"""The way back: a network of ours as a checkpoint of mmsegmentation."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isanet_pl.checkpoint_io import save_whole
from isanet_pl.convert.layout import check_finite, rename
from isanet_pl.convert.mmseg import BACKBONE, RULES
from isanet_pl.convert.trained import Trained
from isanet_pl.errors import InputError
from isanet_pl.models import ISANet

log = logging.getLogger(__name__)

# What a network of ours must be, besides its sizes, for theirs to be equal.
EQUAL = {
    "form": "reduced",
    "context": "isa",
    "order": "long_short",
    "mask_padding": False,
    "negative_slope": 0.0,
    "ceil_mode": False,
    "output_stride": 8,
    "last_stage": 4,
}
# Depth and stem of their ResNetV1c.
RESNETS = {
    "resnet50c": (50, 64),
    "resnet101c": (101, 64),
    "resnet50s": (50, 128),
    "resnet101s": (101, 128),
}
NORM = {"type": "SyncBN", "requires_grad": True}


def write_mmseg(trained: Trained, path: Path) -> None:
    """Writes a checkpoint that mmsegmentation loads, with the config of its model in it.

    The logits of the two networks are equal, to rounding. What there is to how images are shown,
    and has no place in such a file, is said.

    Raises:
        InputError: There is no network of theirs with the same logits, or a weight is not finite.
    """
    arguments = trained.network.arguments
    _check(arguments, path)
    state: dict[str, Tensor] = dict(trained.network.state_dict())
    check_finite(state, path)
    if not arguments["context_first"]:
        # Theirs concatenates the context first: the two halves of what comes in change places.
        weight = state["context.conv_bn.0.weight"]
        state["context.conv_bn.0.weight"] = weight.roll(arguments["out_channels"], dims=1)
    if not arguments["value_bias"]:
        for name in ("long", "short"):
            bias = torch.zeros(arguments["value_channels"])
            state[f"context.stages.0.{name}_range_sa.f_value.bias"] = bias
    names = list(trained.classes.names)
    palette = [list(colour) for colour in trained.classes.palette]
    meta = {
        "cfg": f"model = {model_config(trained)!r}\ntest_pipeline = {pipeline(trained)!r}\n",
        "dataset_meta": {"classes": names, "palette": palette},
        "CLASSES": names,  # where v0.x looks for them
        "PALETTE": palette,
        "iter": trained.steps,
    }
    renamed = {rename(name, RULES): value for name, value in state.items()}
    save_whole({"meta": meta, "state_dict": renamed}, path)
    lost = left_behind(trained.network)
    if lost:
        log.warning(
            "%s: not written, as no model of mmsegmentation has it: %s", path, ", ".join(lost)
        )


def _check(arguments: Mapping[str, Any], path: Path) -> None:
    """Refuses a network that mmsegmentation cannot build."""
    reasons = [
        f"{key} is {arguments[key]}, in theirs {value}"
        for key, value in EQUAL.items()
        if arguments[key] != value
    ]
    if arguments["backbone"] not in RESNETS:
        reasons.append(f"backbone is {arguments['backbone']}, in theirs {' or '.join(RESNETS)}")
    if len(arguments["down_factors"]) != 1:
        reasons.append(f"down_factors are {arguments['down_factors']}, in theirs there is one")
    if arguments["value_channels"] != arguments["out_channels"]:
        reasons.append("value_channels differ from out_channels")
    if reasons:
        raise InputError(
            f"{path} is not written: mmsegmentation has no equal network, as {'; '.join(reasons)}"
        )


def left_behind(network: ISANet) -> list[str]:
    """Returns what there is to how images are shown that mmsegmentation's model cannot do.

    Its views of several scales, and mirrored, are no part of a model but of an evaluation.
    """
    inference = network.inference
    lost = []
    if list(inference.scales) != [1]:
        lost.append(f"scales {list(inference.scales)}")
    if inference.flip:
        lost.append("flip")
    multiple = inference.multiple_for(network)
    if multiple > 1 and inference.mode == "slide":  # theirs pads the image, not each window
        lost.append(f"padding to multiples of {multiple}")
    return lost


def pipeline(trained: Trained) -> list[dict[str, Any]]:
    """Returns how mmsegmentation 1.x reads an image for the model, as a config."""
    steps: list[dict[str, Any]] = [{"type": "LoadImageFromFile"}]
    base_size = trained.network.inference.base_size
    if base_size is not None:
        steps.append({"type": "Resize", "scale": tuple(base_size), "keep_ratio": True})
    return [*steps, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]


def model_config(trained: Trained) -> dict[str, Any]:
    """Returns the model of mmsegmentation 1.x that the checkpoint loads into, as a config."""
    arguments, inference = trained.network.arguments, trained.network.inference
    depth, stem_channels = RESNETS[arguments["backbone"]]
    multiple = inference.multiple_for(trained.network)
    pads = inference.mode == "whole" and multiple > 1
    padding = {"test_cfg": {"size_divisor": multiple}} if pads else {}
    test: dict[str, Any] = {"mode": inference.mode}
    if inference.mode == "slide":
        test |= {"crop_size": inference.crop_size, "stride": inference.window_stride}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": list(arguments["mean"]),
            "std": list(arguments["std"]),
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            **padding,
        },
        "backbone": {
            "type": "ResNetV1c",
            "depth": depth,
            "stem_channels": stem_channels,
            "norm_cfg": NORM,
            **BACKBONE,
        },
        "decode_head": _decode_head(arguments),
        "auxiliary_head": _auxiliary_head(arguments) if arguments["aux_head"] else None,
        "train_cfg": {},
        "test_cfg": test,
    }


def _decode_head(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "ISAHead",
        "in_channels": 2048,
        "in_index": 3,
        "channels": arguments["out_channels"],
        "isa_channels": arguments["key_channels"],
        "down_factor": tuple(arguments["down_factors"][0]),
        **_classifier(arguments, loss_weight=1.0),
    }


def _auxiliary_head(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "FCNHead",
        "in_channels": 1024,
        "in_index": 2,
        "channels": arguments["aux_channels"],
        "num_convs": 1,
        "concat_input": False,
        **_classifier(arguments, loss_weight=0.4),
    }


def _classifier(arguments: Mapping[str, Any], loss_weight: float) -> dict[str, Any]:
    return {
        "num_classes": arguments["num_classes"],
        "dropout_ratio": arguments["dropout"],
        "norm_cfg": NORM,
        "align_corners": arguments["align_corners"],
        "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": loss_weight},
    }
