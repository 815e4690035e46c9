"""Look into Person (LIP), single people in 19 body parts and kinds of clothing."""

from isanet_pl.data.archives import find_below
from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import Pair, pair_by_stem


class LIP(SegmentationDataModule):
    """LIP, single person: 30,462 train and 10,000 val images, 19 classes and the background.

    Get TrainVal_images.zip and TrainVal_parsing_annotations.zip from sysu-hcp.net/lip. They unpack
    to

        TrainVal_images/{train_images,val_images}/1000_1234574.jpg
        TrainVal_parsing_annotations/{train,val}_segmentations/1000_1234574.png

    `root` holds these two folders, or their four sub-folders. Masks hold 0 for the background and
    1..19. The labels of the test images are not public, so `test` evaluates val.

    A mirrored left arm is a right arm: mirroring trades the three pairs of classes.

    Terms: see sysu-hcp.net/lip. Cite: Gong, Liang, Zhang, Shen, Lin, "Look into person:
    self-supervised structure-sensitive learning and a new benchmark for human parsing", CVPR 2017.
    """

    homepage = "http://sysu-hcp.net/lip"
    num_images = {"train": 30462, "val": 10000}
    class_names = (
        "Background",
        "Hat",
        "Hair",
        "Glove",
        "Sunglasses",
        "UpperClothes",
        "Dress",
        "Coat",
        "Socks",
        "Pants",
        "Jumpsuits",
        "Scarf",
        "Skirt",
        "Face",
        "Left-arm",
        "Right-arm",
        "Left-leg",
        "Right-leg",
        "Left-shoe",
        "Right-shoe",
    )
    palette = (
        (0, 0, 0),
        (128, 0, 0),
        (255, 0, 0),
        (0, 85, 0),
        (170, 0, 51),
        (255, 85, 0),
        (0, 0, 85),
        (0, 119, 221),
        (85, 85, 0),
        (0, 85, 85),
        (85, 51, 0),
        (52, 86, 128),
        (0, 128, 0),
        (0, 0, 255),
        (51, 170, 221),
        (0, 255, 255),
        (85, 255, 170),
        (170, 255, 85),
        (255, 255, 0),
        (255, 170, 0),
    )
    mirrored_classes = ((14, 15), (16, 17), (18, 19))

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split; `test` is val."""
        part = "train" if split == "train" else "val"
        images, masks = (
            find_below(
                self.root_path,
                name,
                places=(archive, f"{archive}/{archive}", "."),  # some zips nest their folder
                source=self.homepage,
            )
            for archive, name in (
                ("TrainVal_images", f"{part}_images"),
                ("TrainVal_parsing_annotations", f"{part}_segmentations"),
            )
        )
        return pair_by_stem(images, masks)
