"""A trained network with all that its checkpoint tells, and the checkpoint of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning

import isanet_pl.data
from isanet_pl.checkpoint_io import read_checkpoint, save_whole
from isanet_pl.data import SegmentationDataModule
from isanet_pl.data.palette import Colour, default_palette
from isanet_pl.errors import InputError
from isanet_pl.losses import SegmentationLoss
from isanet_pl.models import ISANet
from isanet_pl.module import SegmentationModule

_MODULES: list[type[SegmentationDataModule]] = [
    getattr(isanet_pl.data, name) for name in isanet_pl.data.__all__
]
DATA_SETS = {data_set.__name__.lower(): data_set for data_set in _MODULES if data_set.homepage}
"""The data sets with classes of their own, by name."""


@dataclass(frozen=True)
class Classes:
    """What the classes of a network are.

    Args:
        names: K names.
        palette: K colours, RGB 0..255.
        data_set: Name of the data set, a key of DATA_SETS, if it is one of ours.
    """

    names: Sequence[str]
    palette: Sequence[Colour]
    data_set: str | None = None

    @property
    def mirrored(self) -> Sequence[tuple[int, int]]:
        """Returns the pairs of classes that a mirror turns into each other, as the data set says.

        Files of other projects say nothing of them.
        """
        return () if self.data_set is None else DATA_SETS[self.data_set].mirrored_classes


@dataclass(frozen=True)
class Trained:
    """A trained network and what its checkpoint tells about it.

    Args:
        network: The network, with its weights and how images are shown to it.
        classes: Its classes.
        steps: Optimiser steps behind the weights, 0 if unknown.
    """

    network: ISANet
    classes: Classes
    steps: int = 0


def find_classes(
    num_classes: int, path: Path, data_set: str | None, names: Any = None, palette: Any = None
) -> Classes:
    """Returns the classes of a data set, or else those that a file names.

    Args:
        num_classes: K, as the weights have it.
        path: The file, for messages.
        data_set: Name of a data set; None: the one that has the file's names, if there is one.
        names: Names of the classes in the file, or anything else.
        palette: Colours of the classes in the file, or anything else.

    Raises:
        InputError: There are no names, or not K of them.
    """
    if data_set is None and isinstance(names, list | tuple):
        # Some of mmsegmentation's names for ADE20K end with a blank.
        names = [str(name).strip() for name in names]
        same = (key for key, known in DATA_SETS.items() if list(known.class_names) == names)
        data_set = next(same, None)
    if data_set is not None:
        names, palette = DATA_SETS[data_set].class_names, DATA_SETS[data_set].palette
    if not isinstance(names, list | tuple):
        raise InputError(f"{path} does not name its classes: give --data-set, one of {_known()}")
    if len(names) != num_classes:
        raise InputError(
            f"{path} has {num_classes} classes, but {data_set or 'its meta'} names {len(names)}; "
            f"give another --data-set, one of {_known()}"
        )
    if not isinstance(palette, list | tuple) or len(palette) != num_classes:
        palette = default_palette(num_classes)
    return Classes(list(names), [(int(r), int(g), int(b)) for r, g, b in palette], data_set)


def _known() -> str:
    return ", ".join(DATA_SETS)


def write_checkpoint(trained: Trained, path: Path) -> None:
    """Writes a checkpoint as `isanet-pl fit` does, without the state of an optimiser."""
    module = SegmentationModule(
        trained.network,
        SegmentationLoss(),
        list(trained.classes.names),
        list(trained.classes.palette),
        inference=trained.network.inference,
    )
    checkpoint: dict[str, Any] = {
        "epoch": 0,
        "global_step": trained.steps,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    module.on_save_checkpoint(checkpoint)
    save_whole(checkpoint, path)


def read_trained(path: Path) -> Trained:
    """Returns the network of a checkpoint of `isanet-pl fit`, or of a converted one.

    Raises:
        InputError: The file is no such checkpoint.
    """
    try:
        network = ISANet.from_checkpoint(path)
        content = read_checkpoint(path)
        saved = content["hyper_parameters"]
        return Trained(
            network,
            Classes(saved["class_names"], saved["palette"]),
            content.get("global_step", 0),
        )
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint of isanet-pl: {error}") from error
