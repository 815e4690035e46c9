"""COCO-Stuff, everyday photographs with 80 things and 91 stuffs, in its two sizes."""

from pathlib import Path

from isanet_pl.data.archives import find_below, list_ids, pair_ids, read_ids, read_mat
from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import IGNORE, Codes, Pair
from isanet_pl.data.palette import default_palette

UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
"""Ids of things that COCO has no masks of: street sign, hat, shoe, eye glasses, plate, mirror,
window, desk, door, blender, hair brush."""
CLASS_IDS = tuple(i for i in range(1, 183) if i not in UNUSED_IDS)
"""COCO-Stuff's id of each of the 171 classes: things below 92, stuffs from there on."""
# fmt: off
CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "banner", "blanket", "branch", "bridge",
    "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other",
    "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel",
    "ground-other", "hill", "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss",
    "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree",
    "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)
# fmt: on
# The colours that toolboxes give out repeat themselves (person and bicycle look the same), so:
PALETTE = default_palette(len(CLASS_NAMES) + 1)[1:]
"""PASCAL VOC's colour map without its black."""


class COCOStuff10k(SegmentationDataModule):
    """COCO-Stuff 10k: 9,000 train and 1,000 val images of COCO 2014, 171 classes.

    Get cocostuff-10k-v1.1.zip from github.com/nightrome/cocostuff10k. It unpacks to

        images/COCO_train2014_000000000077.jpg
        annotations/COCO_train2014_000000000077.mat
        imageLists/{train,test}.txt

    `root` holds these three folders, or a folder `dataset` with them. The matrix S of a .mat file
    holds 0 for unlabelled pixels, which are ignored, and 1..182 with eleven gaps for the classes
    (version 1.0 numbered them otherwise and does not work here). The authors' test list is what the
    field evaluates on: it is both `val` and `test`.

    Annotations: CC BY 4.0; images: Flickr's terms of use. Cite: Caesar, Uijlings, Ferrari,
    "COCO-Stuff: thing and stuff classes in context", CVPR 2018.
    """

    homepage = "https://github.com/nightrome/cocostuff10k"
    num_images = {"train": 9000, "val": 1000}
    class_names = CLASS_NAMES
    palette = PALETTE
    label_map = {0: IGNORE, **{code: index for index, code in enumerate(CLASS_IDS)}}

    @staticmethod
    def read_codes(path: Path) -> Codes:
        """Returns COCO-Stuff's ids (H, W), 0 where there is none."""
        return read_mat(path, "S")

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split; `test` is val."""
        part = "train" if split == "train" else "test"
        ids, images, masks = (
            find_below(self.root_path, name, places=(".", "dataset"), source=self.homepage)
            for name in (f"imageLists/{part}.txt", "images", "annotations")
        )
        return pair_ids(read_ids(ids), images, masks, ".jpg", ".mat")


class COCOStuff164k(SegmentationDataModule):
    """COCO-Stuff: the 118,287 train and 5,000 val images of COCO 2017, 171 classes.

    Get train2017.zip, val2017.zip and stuffthingmaps_trainval2017.zip by the links on
    github.com/nightrome/cocostuff. Unpack them in `root`, the last one in a folder of its own:

        {train2017,val2017}/000000000009.jpg
        stuffthingmaps_trainval2017/{train2017,val2017}/000000000009.png

    or, as that page proposes, all into `images` and `annotations`. Masks hold COCO-Stuff's ids less
    one, that is 0..181 with eleven gaps, and 255 for unlabelled pixels. The test images have no
    public masks, so `test` evaluates val.

    Annotations: CC BY 4.0; images: Flickr's terms of use. Cite: Caesar, Uijlings, Ferrari,
    "COCO-Stuff: thing and stuff classes in context", CVPR 2018.
    """

    homepage = "https://github.com/nightrome/cocostuff"
    num_images = {"train": 118287, "val": 5000}
    class_names = CLASS_NAMES
    palette = PALETTE
    label_map = {code - 1: index for index, code in enumerate(CLASS_IDS)}

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split; `test` is val."""
        part = "train2017" if split == "train" else "val2017"
        images, masks = (
            find_below(self.root_path, part, places=places, source=self.homepage)
            for places in ((".", "images"), ("stuffthingmaps_trainval2017", "annotations"))
        )
        return pair_ids(list_ids(images, ".jpg"), images, masks, ".jpg", ".png")
