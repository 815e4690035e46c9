"""Reading what a checkpoint says about itself."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from isanet_pl.errors import InputError

# What the command line takes from the data: it cannot be given as well.
LINKED_NETWORK = ("num_classes",)
LINKED_INFERENCE = ("base_size", "mirrored_classes")


def check_file(path: str) -> None:
    """Returns nothing if there is a file that can be a checkpoint.

    Raises:
        InputError: There is none.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint not found: --ckpt_path {path}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a checkpoint, or is truncated")


def config_of(path: str) -> dict[str, Any]:
    """Returns the config that a checkpoint stands for: network, how it sees images, classes.

    The classes come as the data set `Images`, which can only predict.

    Args:
        path: A checkpoint of `isanet-pl fit`, or a converted one. Nothing in it is executed.

    Raises:
        InputError: The file is no checkpoint of this project.
    """
    check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved = content["hyper_parameters"]
        network = {k: v for k, v in saved["network"].items() if k not in LINKED_NETWORK}
        inference = dict(saved.get("inference", {}))
        classes: dict[str, Any] = {
            "class_names": list(saved["class_names"]),
            "palette": [list(colour) for colour in saved["palette"]],
        }
    except Exception as error:
        raise InputError(f"{path} is not a checkpoint of isanet-pl: {error!r}") from error
    for key in LINKED_INFERENCE:
        value = inference.pop(key, None)
        if value:
            classes[key] = value
    return {
        "model": {"network": network, "loss": {}, "inference": inference},
        "data": {"class_path": "Images", "init_args": classes},
    }
