"""PASCAL-Context, the photographs of VOC 2010 with things and stuffs, in 59 or 60 classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isanet_pl.data.ade20k import ADE20K
from isanet_pl.data.archives import find_below, pair_ids, read_ids, read_mat
from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import Codes, Pair, read_mask
from isanet_pl.data.palette import Colour

DETAIL = {"train": 4996, "val": 5104}
"""Images of the lists in SegmentationContext, made from Detail API's trainval_merged.json."""
NUM_LABELS = 459
# fmt: off
LABELS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on
"""Which of the 459 labels the 59 classes are, in the order of `PascalContext.class_names`."""
CLASS_OF_LABEL = np.zeros(NUM_LABELS + 1, dtype=np.int64)
CLASS_OF_LABEL[list(LABELS)] = range(1, len(LABELS) + 1)


class PascalContext(SegmentationDataModule):
    """PASCAL-Context: 4,998 train and 5,105 val images, the 59 most frequent of 459 labels.

    Get the annotations, trainval.tar.gz, from cs.stanford.edu/~roozbeh/pascal-context and the
    images, VOCtrainval_03-May-2010.tar, from host.robots.ox.ac.uk/pascal/VOC/voc2010. Unpacked in
    one place:

        VOCdevkit/VOC2010/
            JPEGImages/2008_000002.jpg
            ImageSets/Main/{train,val}.txt
        trainval/2008_000002.mat

    `root` is the place, or the folder VOC2010 with `trainval` moved into it. The matrix LabelMap of
    a .mat file holds 1..459. Instead of `trainval`, a folder `SegmentationClassContext` with PNG
    masks (0 for the background, 1..59 for the classes in the order of their names) serves as well.
    The lists of `ImageSets/SegmentationContext`, as mmsegmentation makes them, come first where
    they are there: they leave out two train images and one val image. `test` evaluates val.

    Images: Flickr's terms of use. Cite: Mottaghi, Chen, Liu, Cho, Lee, Fidler, Urtasun, Yuille,
    "The role of context for object detection and semantic segmentation in the wild", CVPR 2014.

    Args:
        root: Folder of the data set.
        background: Everything else is the first of 60 classes; otherwise it is ignored and there
            are 59.
        kwargs: See `SegmentationDataModule`.
    """

    homepage = (
        "https://cs.stanford.edu/~roozbeh/pascal-context (annotations) and "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2010 (images)"
    )
    num_images = {"train": 4998, "val": 5105}  # by VOC's own lists
    # fmt: off
    class_names: Sequence[str] = (
        "background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat",
        "book", "bottle", "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth",
        "computer", "cow", "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food",
        "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse", "person",
        "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign",
        "sky", "snow", "sofa", "table", "track", "train", "tree", "truck", "tvmonitor", "wall",
        "water", "window", "wood",
    )
    # fmt: on
    # The usual colours; bicycle and snow have the same one.
    palette: Sequence[Colour] = ADE20K.palette[:60]

    def __init__(self, root: str | None = None, background: bool = True, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if not background:
            self.class_names = self.class_names[1:]
            self.palette = self.palette[1:]
            self.reduce_zero_label = True

    @staticmethod
    def read_codes(path: Path) -> Codes:
        """Returns 0 for the background and 1..59 for the classes, (H, W)."""
        if path.suffix != ".mat":
            return read_mask(path)
        labels = read_mat(path, "LabelMap")
        known = (labels >= 0) & (labels <= NUM_LABELS)
        return np.where(known, CLASS_OF_LABEL[np.where(known, labels, 0)], labels)

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split; `test` is val."""
        part = "train" if split == "train" else "val"
        ids = self._find(f"ImageSets/SegmentationContext/{part}.txt", f"ImageSets/Main/{part}.txt")
        if ids.parent.name == "SegmentationContext":
            self.num_images = DETAIL
        masks = self._find("trainval", "SegmentationClassContext")
        ending = ".mat" if masks.name == "trainval" else ".png"
        return pair_ids(read_ids(ids), self._find("JPEGImages"), masks, ".jpg", ending)

    def _find(self, *names: str) -> Path:
        places = (".", "VOC2010", "VOCdevkit/VOC2010")
        return find_below(self.root_path, *names, places=places, source=self.homepage)
