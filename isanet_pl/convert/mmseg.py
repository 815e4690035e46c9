"""mmsegmentation's checkpoints, read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isanet_pl.convert.files import (
    check_config,
    find,
    read_config,
    read_pth,
    state_dict_of,
    whole_number,
)
from isanet_pl.convert.layout import Rules, build
from isanet_pl.convert.trained import Classes, Trained, find_classes
from isanet_pl.errors import InputError
from isanet_pl.inference import Inference
from isanet_pl.models.isanet import IMAGENET_MEAN, IMAGENET_STD

RULES: Rules = (
    (r"^backbone\.net\.conv1\.", "backbone.stem."),
    (r"^backbone\.net\.bn1\.", "backbone.stem.7."),
    (r"^backbone\.net\.", "backbone."),
    (r"^reduce\.0\.", "decode_head.in_conv.conv."),
    (r"^reduce\.1\.", "decode_head.in_conv.bn."),
    (r"^context\.stages\.0\.long_range_sa\.", "decode_head.global_relation."),
    (r"^context\.stages\.0\.short_range_sa\.", "decode_head.local_relation."),
    (r"\.f_(key|query)\.0\.", r".\1_project.0.conv."),
    (r"\.f_(key|query)\.1\.", r".\1_project.0.bn."),
    (r"\.f_(key|query)\.3\.", r".\1_project.1.conv."),
    (r"\.f_(key|query)\.4\.", r".\1_project.1.bn."),
    (r"\.f_value\.", ".value_project."),
    (r"\.W\.0\.", ".output_project.conv."),
    (r"\.W\.1\.", ".output_project.bn."),
    (r"^context\.conv_bn\.0\.", "decode_head.out_conv.conv."),
    (r"^context\.conv_bn\.1\.", "decode_head.out_conv.bn."),
    (r"^classifier\.", "decode_head.conv_seg."),
    (r"^aux_head\.0\.", "auxiliary_head.convs.0.conv."),
    (r"^aux_head\.1\.", "auxiliary_head.convs.0.bn."),
    (r"^aux_head\.4\.", "auxiliary_head.conv_seg."),
)
# What a config may say about the backbone that its tensors do not; ours is like this.
BACKBONE = {
    "style": "pytorch",
    "strides": [1, 2, 1, 1],
    "dilations": [1, 1, 2, 4],
    "contract_dilation": True,
    "multi_grid": None,
}
# The published settings, for files that do not say theirs.
BASE_SIZES = {"cityscapes": (2048, 1024), "ade20k": (2048, 512), "voc": (2048, 512)}
RESIZING = ("Resize", "MultiScaleFlipAug")  # steps of a pipeline
SLIDE_769 = {"mode": "slide", "crop_size": [769, 769], "stride": [513, 513]}


def read_mmseg(
    path: Path, data_set: str | None = None, align_corners: bool | None = None
) -> Trained:
    """Returns the ISANet of a checkpoint of mmsegmentation, v0.x or v1.x.

    Args:
        path: The file.
        data_set: Whose classes these are, a key of DATA_SETS; None: the file says.
        align_corners: Of the upsampling; None: the file's config or its name says.

    Raises:
        InputError: The file holds no such network exactly, or does not say all that is needed.
    """
    content = read_pth(path)
    state = state_dict_of(content, path)
    meta = find(content, "meta")
    config = read_config(find(meta, "cfg", default=find(meta, "config")))
    model = find(config, "model")
    check_config(find(model, "backbone"), BACKBONE, path)
    check_config(find(model, "decode_head", "act_cfg"), {"type": "ReLU"}, path)
    crop_size = _crop_size(path)
    if align_corners is None:
        align_corners = find(model, "decode_head", "align_corners")
    if align_corners is None:
        align_corners = _goes_with_aligned_corners(crop_size, path)
    network = build(
        state,
        RULES,
        path,
        **_pixels(config),
        down_factors=[tuple(find(model, "decode_head", "down_factor", default=(8, 8)))],
        align_corners=align_corners,
    )
    about = find(meta, "dataset_meta", default=meta)
    names, palette = (
        find(about, key, default=find(about, key.lower())) for key in ("CLASSES", "PALETTE")
    )
    classes = find_classes(network.arguments["num_classes"], path, data_set, names, palette)
    network.inference = _inference(config, crop_size, classes, path)
    return Trained(network, classes, whole_number(find(meta, "iter")))


def _pixels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how the network's input is made of pixels: `bgr`, `mean`, `std`; see `build`.

    What 1.x is not told to do, it does not do (mmseg/models/data_preprocessor.py); in 0.x, and
    where there is no config, it is as in the published settings.
    """
    pixels = find(config, "model", "data_preprocessor")
    if pixels is not None:
        return {
            "bgr": not find(pixels, "bgr_to_rgb", default=False),
            "mean": find(pixels, "mean", default=(0.0, 0.0, 0.0)),
            "std": find(pixels, "std", default=(1.0, 1.0, 1.0)),
        }
    pixels = find(config, "img_norm_cfg")
    return {
        "bgr": not find(pixels, "to_rgb", default=True),
        "mean": find(pixels, "mean", default=IMAGENET_MEAN),
        "std": find(pixels, "std", default=IMAGENET_STD),
    }


def _crop_size(path: Path) -> int | None:
    """Returns the height of the training crops, if the file's name tells it as published ones."""
    match = re.search(r"(?<!\d)(\d{3,4})x\d{3,4}(?!\d)", path.name)
    return int(match[1]) if match else None


def _goes_with_aligned_corners(crop_size: int | None, path: Path) -> bool:
    if crop_size is None:
        raise InputError(
            f"{path}: neither a config in the file nor its name (512x1024, 769x769) tells "
            "align_corners: give --align-corners true for crops of 8x + 1 pixels, else false"
        )
    return crop_size % 8 == 1


def _inference(
    config: Mapping[str, Any], crop_size: int | None, classes: Classes, path: Path
) -> Inference:
    """Returns how images are shown: as the config says, else as in the published settings.

    Raises:
        InputError: The config stretches them, or pads them otherwise than is possible here.
    """
    default = SLIDE_769 if crop_size == 769 else {"mode": "whole"}
    tests = (find(config, "test_cfg"), find(config, "model", "test_cfg"), default)
    test: dict[str, Any] = next(test for test in tests if find(test, "mode"))
    steps = find(config, "test_pipeline", default=[])
    sizes = [find(step, "scale", default=find(step, "img_scale")) for step in steps]
    # mmcv's own default, in 1.x, is false; 0.x has the size elsewhere.
    if any(
        find(s, "type") == "Resize" and find(s, "scale") and not find(s, "keep_ratio")
        for s in steps
    ):
        raise InputError(
            f"{path}: the config in it stretches images to another shape (Resize without "
            "keep_ratio), which this project does not do"
        )
    for size in filter(None, sizes):
        if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
            raise InputError(
                f"{path}: the config in it tests at the size {size}; only a width and a height can "
                "be converted"
            )
    # A pipeline that ends without a word of size shows images as they are.
    silent = steps and not any(find(step, "type") in RESIZING for step in steps)
    usual = None if silent else BASE_SIZES.get(str(classes.data_set))
    if usual and crop_size == 769:
        usual = (usual[0] + 1, usual[1] + 1)
    settings: dict[str, Any] = {k: tuple(test[k]) for k in ("crop_size", "stride") if find(test, k)}
    base_size = next((tuple(size) for size in sizes if size), usual)
    padding = find(config, "model", "data_preprocessor", "test_cfg", default={})
    multiple = find(padding, "size_divisor", default=1)
    if find(padding, "size") or (multiple != 1 and test["mode"] == "slide"):
        raise InputError(
            f"{path}: the config in it pads images to a size, or before windows slide over them "
            f"(data_preprocessor.test_cfg {padding}), which this project does not do"
        )
    return Inference(
        mode=test["mode"],
        base_size=base_size,
        pad_multiple=multiple,
        mirrored_classes=classes.mirrored,
        **settings,
    )
