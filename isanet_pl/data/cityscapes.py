"""Cityscapes, street scenes of 50 cities from a driving car, in 19 classes."""

from typing import Any, Literal

from isanet_pl.data.archives import find_below, list_ids, pair_ids
from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import IGNORE, Pair
from isanet_pl.errors import InputError

CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label id of each of the 19 classes; the other ones of 0..33 are not evaluated."""
BLACK = "troisdorf_000000_000073"
"""A damaged frame of train_extra: black, and without labels."""


class Cityscapes(SegmentationDataModule):
    """Cityscapes: 2,975 train and 500 val images of 2048x1024, 19,997 more with coarse masks.

    Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com
    (registration), for `coarse` leftImg8bit_trainextra.zip and gtCoarse.zip as well. Unpack them in
    `root`:

        leftImg8bit/{train,val,train_extra}/CITY/CITY_000000_000019_leftImg8bit.png
        gtFine/{train,val}/CITY/CITY_000000_000019_gtFine_labelIds.png
        gtCoarse/train_extra/CITY/CITY_000000_000019_gtCoarse_labelIds.png

    Masks hold the label ids 0..33, which are translated to the 19 classes; the rest is ignored. The
    labels of the test images are not public, so `test` evaluates val. For the benchmark's server,
    `predict` on leftImg8bit/test.

    Terms: non-commercial use such as research and teaching, cityscapes-dataset.com/license. Cite:
    Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016.

    Args:
        root: Folder of the data set.
        labels: Which masks to read. "labelTrainIds" are those that the official scripts make:
            0..18 for the classes and 255.
        coarse: Train on train_extra as well.
        kwargs: See `SegmentationDataModule`.
    """

    homepage = "https://www.cityscapes-dataset.com/downloads"
    num_images = {"train": 2975, "val": 500}
    class_names = (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    )
    palette = (
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    )
    label_map: dict[int, int] | None = {
        **dict.fromkeys(range(34), IGNORE),
        **{code: index for index, code in enumerate(CLASS_IDS)},
    }

    def __init__(
        self,
        root: str | None = None,
        labels: Literal["labelIds", "labelTrainIds"] = "labelIds",
        coarse: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.labels = labels
        self.coarse = coarse
        if labels == "labelTrainIds":
            self.label_map = None
        if coarse:
            self.num_images = {**self.num_images, "train": self.num_images["train"] + 19997}

    def mask_codes(self) -> list[int]:
        """Returns the label id of each class: the server takes no other codes."""
        return list(CLASS_IDS)

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split; `test` is val."""
        pairs = self._list_part("train" if split == "train" else "val", "gtFine")
        if split == "train" and self.coarse:
            pairs += self._list_part("train_extra", "gtCoarse")
        return pairs

    def _list_part(self, part: str, kind: Literal["gtFine", "gtCoarse"]) -> list[Pair]:
        images, masks = (
            find_below(self.root_path, f"{folder}/{part}", source=self.homepage)
            for folder in ("leftImg8bit", kind)
        )
        endings = ("_leftImg8bit.png", f"_{kind}_{self.labels}.png")
        pairs: list[Pair] = []
        folders = (path for path in images.iterdir() if path.is_dir())
        # Others are of the system, such as .ipynb_checkpoints and a NAS's @eaDir.
        cities = sorted(path for path in folders if not path.name.startswith((".", "@")))
        if not cities:
            raise InputError(f"no folder of a city in {images}; get it from {self.homepage}")
        for city in cities:
            ids = [name for name in list_ids(city, endings[0]) if name != BLACK]
            pairs += pair_ids(ids, city, masks / city.name, *endings)
        return pairs
