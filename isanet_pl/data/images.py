"""Images without masks: what a checkpoint alone can segment."""

from collections.abc import Sequence
from typing import Any

from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import Pair
from isanet_pl.data.palette import Colour
from isanet_pl.errors import InputError


class Images(SegmentationDataModule):
    """A folder of images for `predict`, and the classes to find in them.

    `predict` takes it by itself when it is given a checkpoint and no config.

    Args:
        class_names: Names of the classes 0..K-1.
        palette: Their colours, RGB 0..255.
        mirrored_classes: Pairs of classes that a mirror turns into each other.
        kwargs: See `SegmentationDataModule`; those for training are not used.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        palette: Sequence[Colour],
        mirrored_classes: Sequence[tuple[int, int]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.class_names = list(class_names)
        self.palette = list(palette)
        self.mirrored_classes = list(mirrored_classes)

    def list_pairs(self, split: Split) -> list[Pair]:
        """Raises an InputError: there are no masks."""
        raise InputError("Images has no masks; name a data set: --data NAME --data.root DIR")
