"""Reading what a checkpoint says about itself."""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from isanet_pl.errors import InputError, why_no_checkpoint
from isanet_pl.exported import read_metadata

LINKED_INFERENCE = ("base_size", "mirrored_classes")
"""Arguments of `Inference` that the command line takes from the data: they cannot be given too."""


def check_file(path: str, command: str) -> None:
    """Refuses what cannot be a checkpoint for a command.

    Raises:
        InputError: There is none.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint not found: --ckpt_path {path}")
    if is_onnx(path):
        if command in ("fit", "export"):
            raise InputError(f"{command} needs a checkpoint; {path} is an exported network")
    elif not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a checkpoint, or is truncated")
    else:
        _check_sums(path)


def _check_sums(path: str) -> None:
    """Refuses a checkpoint whose parts do not have their checksums, which torch.load ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        broken = str(error)
    if broken is not None:
        raise InputError(f"{path} is damaged ({broken}): copy it anew, or give another checkpoint")


def is_onnx(path: str) -> bool:
    """Returns whether a file is an exported network, by its name."""
    return Path(path).suffix == ".onnx"


def _describe(path: str) -> dict[str, Any]:
    if is_onnx(path):
        return read_metadata(Path(path))
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    description: dict[str, Any] = content["hyper_parameters"]
    return description


def config_of(path: str, command: str) -> dict[str, Any]:
    """Returns the config that a checkpoint stands for: network, how it sees images, classes.

    The classes come as the data set `Images`, which can only predict.

    Args:
        path: A checkpoint of `isanet-pl fit`, or a converted one, or an ONNX file of `isanet-pl
            export`. Nothing in it is executed.
        command: What it is for.

    Raises:
        InputError: The file is no checkpoint of this project.
    """
    check_file(path, command)
    try:
        saved = _describe(path)
        network = {k: v for k, v in saved["network"].items() if k != "num_classes"}
        inference = dict(saved.get("inference", {}))
        classes: dict[str, Any] = {
            "class_names": list(saved["class_names"]),
            "palette": [list(colour) for colour in saved["palette"]],
        }
    except InputError:
        raise
    except Exception as error:
        raise InputError(why_no_checkpoint(path, error)) from error
    size, window = saved.get("size"), inference.get("crop_size")
    fits = window and all(w <= s for w, s in zip(window, size or window, strict=True))
    if size and (inference.get("mode") != "slide" or not fits):
        # A file for one size of images sees larger ones by windows of that size.
        inference |= {"mode": "slide", "crop_size": list(size), "stride": None}
    if size:
        inference["pad_multiple"] = None  # the file pads to its size by itself
    for key in LINKED_INFERENCE:
        value = inference.pop(key, None)
        if value:
            classes[key] = value
    return {
        "model": {"network": network, "loss": {}, "inference": inference},
        "data": {"class_path": "Images", "init_args": classes},
    }


def _values_of(args: Sequence[str], *names: str) -> list[str]:
    """Returns the values of an option, which may have several names, in arguments."""
    following = [*args[1:], ""]
    pairs = [
        part.split("=", 1) if "=" in part else [part, after]
        for part, after in zip(args, following, strict=True)
    ]
    return [value for name, value in pairs if name in names]


def _read_config(text: str) -> dict[str, Any]:
    """Returns a config, a file or YAML; nothing of one that is broken, which the parser tells.

    Its `data` is read too where it is a file of its own.
    """
    try:
        path = Path(text)
        # Not `path.is_file()`, which raises where a text is too long for a name.
        named = os.path.isfile(text)  # noqa: PTH113
        content = yaml.safe_load(path.read_text("utf-8") if named else text)
        if not isinstance(content, dict):
            return {}
        data = content.get("data")
        if isinstance(data, str) and (path.parent / data).is_file():
            content["data"] = yaml.safe_load((path.parent / data).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content


def _says(config: Mapping[str, Any], section: str, part: str) -> bool:
    """Returns whether a config has a part of a section, or has that by its name or in a file."""
    value = config.get(section)
    return isinstance(value, str) or (isinstance(value, dict) and part in value)


def _sets_base_size(config: Mapping[str, Any]) -> bool:
    data = config.get("data")
    if not isinstance(data, dict):
        return False
    return "base_size" in data or "base_size" in (data.get("init_args") or {})


def with_config_of_checkpoint(args: list[str]) -> list[str]:
    """Returns the arguments, with the checkpoint's config in front if theirs has no network.

    Args:
        args: Of a command that needs trained weights, the command first.

    Raises:
        InputError: The file that they name is no checkpoint of this project.
    """
    options = {part.split("=", 1)[0] for part in args}
    given = [_read_config(text) for text in _values_of(args, "--config", "-c")]
    paths = _values_of(args, "--ckpt_path")
    paths = paths or [str(config["ckpt_path"]) for config in given if config.get("ckpt_path")]
    if not paths or any(_says(config, "model", "network") for config in given):
        return args
    config = config_of(paths[-1], args[0])  # the one that the parser takes
    named = "--data" in options or any(_says(config, "data", "class_path") for config in given)
    if args[0] in ("predict", "export") and not named:
        return [args[0], "--config", json.dumps(config), *args[1:]]
    # The user's data set knows its classes; images come to the size that was trained for.
    base_size = config.pop("data")["init_args"].get("base_size")
    own = {"--data.base_size", "--data.init_args.base_size"} & options
    if base_size and named and not own and not any(map(_sets_base_size, given)):
        args = [*args, f"--data.base_size={json.dumps(base_size)}"]
    return [args[0], "--config", json.dumps(config), *args[1:]]
