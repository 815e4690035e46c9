"""Whether a checkpoint and what a config describes are the same network."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from isanet_pl.errors import InputError
from isanet_pl.finite import first_not_finite

# What a checkpoint and a config may disagree about: it leaves the trained function as it is.
TRAINING_ONLY = frozenset({"pretrained", "weights_path", "dropout", "recompute"})


def check_agreement(
    checkpoint: Mapping[str, Any],
    arguments: Mapping[str, Any],
    class_names: Sequence[str],
    state: Mapping[str, Tensor],
) -> None:
    """Refuses a checkpoint whose weights would not do in a network what they were trained to do.

    Equal shapes are not enough: other windows, say, take the same weights and compute another
    function.

    Args:
        checkpoint: Its content.
        arguments: Those of the network that the config describes.
        class_names: Those of the data.
        state: Names and tensors of the module that is to take the weights.

    Raises:
        InputError: Classes, arguments or tensors differ, or a weight is not finite.
    """
    saved = checkpoint.get("hyper_parameters", {})
    check_classes(list(saved.get("class_names", class_names)), class_names)
    _check_arguments(saved.get("network", {}), arguments)
    _check_tensors(checkpoint.get("state_dict", {}), state)


def check_classes(saved: Sequence[str], own: Sequence[str]) -> None:
    """Refuses a network of other classes, or of the same ones in another order.

    Args:
        saved: Names of the classes that the network was trained for.
        own: Those of the data.

    Raises:
        InputError: They differ.
    """
    if list(saved) != list(own):
        raise InputError(
            f"the network was trained for {len(saved)} classes ({', '.join(saved)}), but the "
            f"data has {len(own)} ({', '.join(own)}); give the data set it was trained on, or "
            "train its weights further with --model.network.weights_path instead of --ckpt_path"
        )


def different_arguments(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Returns a line for each argument by which two networks compute different functions.

    Args:
        saved: Arguments of a checkpoint's network.
        own: Those of the network that the config describes.
    """
    return [
        f"model.network.{key}: checkpoint {saved[key]}, config {value}"
        for key, value in own.items()
        if saved.get(key) is not None  # left to its default, which follows from the others
        and key not in TRAINING_ONLY
        and _plain(saved[key]) != _plain(value)
    ] + [
        f"model.network.{key}: checkpoint {saved[key]}, but this version has no such option"
        for key in saved.keys() - own.keys()
    ]


def different_views(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Returns a line for each setting by which images are seen otherwise than a checkpoint says.

    Args:
        saved: The `inference` of a checkpoint.
        own: That of the network that the config describes.
    """
    return [
        f"model.inference.{key}: checkpoint {saved[key]}, now {value}"
        for key, value in own.items()
        if key in saved and _plain(saved[key]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    """Returns a value as a config has it, where tuples are lists; 0 equals 0.0."""
    return json.loads(json.dumps(value))


def _check_arguments(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    differences = different_arguments(saved, own)
    if differences:
        raise InputError(
            "the checkpoint holds another network than the config describes; change the "
            "config or use the run's own config.yaml:\n  " + "\n  ".join(differences)
        )


def _check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    wrong = sorted(own.keys() ^ given.keys()) + [
        key for key in own.keys() & given.keys() if own[key].shape != given[key].shape
    ]
    if wrong:
        raise InputError(
            f"the checkpoint is damaged, or of another version: {len(wrong)} of its "
            f"{len(own)} tensors are missing, left over or of another shape, such as {wrong[0]}"
        )
    broken = first_not_finite(given)
    if broken:
        raise InputError(f"the checkpoint is of no use: {broken} is not finite; give another")
