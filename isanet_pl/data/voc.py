"""PASCAL VOC 2012, photographs with 20 kinds of objects, with the masks that SBD added."""

from pathlib import Path
from typing import Any

from isanet_pl.data.archives import find_below, pair_ids, read_ids, read_mat
from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import Codes, Pair, read_mask
from isanet_pl.data.palette import default_palette


class VOC(SegmentationDataModule):
    """PASCAL VOC 2012: 10,582 train (1,464 of them VOC's own) and 1,449 val images, 21 classes.

    Get VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012 and, for the
    augmented list, the Semantic Boundaries Dataset (SBD), benchmark.tgz, from
    cs.berkeley.edu/~bharath2/codes/SBD/download.html. Unpacked in one place:

        VOCdevkit/VOC2012/
            JPEGImages/2007_000027.jpg
            SegmentationClass/2007_000032.png
            ImageSets/Segmentation/{train,val}.txt
        benchmark_RELEASE/dataset/
            cls/2008_000002.mat
            {train,val}.txt

    `root` is the place, or the folder VOC2012. The augmented list is all of SBD and VOC's train
    without VOC's val; VOC's mask is taken where there are two. VOC's masks hold 0 for the
    background, 1..20 for the objects and 255, ignored, around them; SBD's hold no 255. The labels
    of VOC's test images are not public, so `test` evaluates val.

    Images: Flickr's terms of use. Cite: Everingham et al., "The PASCAL visual object classes
    challenge: a retrospective", IJCV 2015; Hariharan et al., "Semantic contours from inverse
    detectors", ICCV 2011.

    Args:
        root: Folder of the data set.
        augmented: Train on SBD as well.
        sbd_root: Folder that holds `benchmark_RELEASE`, or that folder, or `dataset` in it; None:
            `root`.
        kwargs: See `SegmentationDataModule`.
    """

    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"
    num_images = {"train": 10582, "val": 1449}
    class_names = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
    palette = default_palette(21)

    def __init__(
        self,
        root: str | None = None,
        augmented: bool = True,
        sbd_root: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.augmented = augmented
        self.sbd_root = sbd_root
        if not augmented:
            self.num_images = {**self.num_images, "train": 1464}

    @staticmethod
    def read_codes(path: Path) -> Codes:
        """Returns the classes (H, W) of one of VOC's or SBD's files."""
        return read_mat(path, "GTcls", "Segmentation") if path.suffix == ".mat" else read_mask(path)

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split, sorted; `test` is val."""
        images, masks, train, val = (
            find_below(
                self.root_path,
                name,
                places=(".", "VOC2012", "VOCdevkit/VOC2012"),
                source=self.homepage,
            )
            for name in (
                "JPEGImages",
                "SegmentationClass",
                "ImageSets/Segmentation/train.txt",
                "ImageSets/Segmentation/val.txt",
            )
        )
        ids = read_ids(train if split == "train" else val)
        pairs = pair_ids(ids, images, masks, ".jpg", ".png")
        if split == "train" and self.augmented:
            sbd = self._find_sbd()
            listed = {*read_ids(sbd / "train.txt"), *read_ids(sbd / "val.txt")}
            more = sorted(listed.difference(ids, read_ids(val)))
            pairs += pair_ids(more, images, sbd / "cls", ".jpg", ".mat")
        return sorted(pairs)

    def _find_sbd(self) -> Path:
        return find_below(
            self.root_path if self.sbd_root is None else Path(self.sbd_root),
            "cls",
            places=("benchmark_RELEASE/dataset", "dataset", "."),
            source="http://www.cs.berkeley.edu/~bharath2/codes/SBD/download.html, tell where it is "
            "(--data.sbd_root DIR) or train on VOC's own images (--data.augmented false)",
        ).parent
