"""Tiny copies of the official data sets, laid out as their archives unpack."""

import numpy as np
from PIL import Image
from scipy.io import savemat

from isanet_pl.data import (
    ADE20K,
    LIP,
    VOC,
    Cityscapes,
    COCOStuff10k,
    COCOStuff164k,
    PascalContext,
)
from isanet_pl.data.coco_stuff import CLASS_IDS

SIZE = (5, 7)


# Writing files


def grid(*codes):
    """Returns a mask of SIZE that holds the codes, one after the other and again."""
    return np.resize(np.array(codes), SIZE)


def write_image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path, codes, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(codes.astype(np.uint8))
    if palette:
        mask.putpalette([*range(255, -1, -1)] * 3)
    mask.save(path)


def write_mat(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content, do_compression=True)


def write_list(path, *ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids))


# Tiny copies of the official layouts


def make_ade20k(root):
    top = root / "ADEChallengeData2016"
    for part, stem, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(1, count + 1):
            name = f"ADE_{stem}_{number:08}"
            write_image(top / "images" / part / f"{name}.jpg")
            write_mask(top / "annotations" / part / f"{name}.png", grid(0, 1, 75, 150))
    (top / "objectInfo150.txt").write_text("Idx\tRatio\n")
    return root


def make_cityscapes(root, labels="labelIds", codes=range(34)):
    for part, kind, cities in (
        ("train", "gtFine", ("aachen", "bremen")),
        ("val", "gtFine", ("munster",)),
        ("train_extra", "gtCoarse", ("augsburg", "troisdorf")),
    ):
        for city in cities:
            frames = ("000000_000073", "000001_000019")
            for name in (f"{city}_{frame}" for frame in frames):
                write_image(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png")
                folder = root / kind / part / city
                write_mask(folder / f"{name}_{kind}_{labels}.png", grid(*codes))
                write_mask(folder / f"{name}_{kind}_instanceIds.png", grid(0))
                write_mask(folder / f"{name}_{kind}_color.png", grid(0), palette=True)
                (folder / f"{name}_{kind}_polygons.json").write_text("{}")
    return root


VOC_TRAIN = ("2007_000032", "2007_000039", "2008_000008")
VOC_VAL = ("2007_000033", "2008_000009")
SBD_TRAIN = ("2008_000002", "2008_000008", "2008_000009")  # one is in VOC's train, one in its val
SBD_VAL = ("2007_000032", "2008_000003")


def make_voc(root, sbd="benchmark_RELEASE/dataset"):
    top = root / "VOCdevkit" / "VOC2012"
    for name in {*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL, "2012_000001"}:
        write_image(top / "JPEGImages" / f"{name}.jpg")
    for name in (*VOC_TRAIN, *VOC_VAL):
        codes = grid(*range(21), 255)
        write_mask(top / "SegmentationClass" / f"{name}.png", codes, palette=True)
    lists = top / "ImageSets" / "Segmentation"
    write_list(lists / "train.txt", *VOC_TRAIN)
    write_list(lists / "val.txt", *VOC_VAL)
    write_list(lists / "trainval.txt", *VOC_TRAIN, *VOC_VAL)
    for name in (*SBD_TRAIN, *SBD_VAL):
        edges = np.array([[np.zeros(SIZE, np.uint8)]] * 20, dtype=object)
        structure = {"Boundaries": edges, "Segmentation": grid(*range(21)).astype(np.uint8)}
        write_mat(root / sbd / "cls" / f"{name}.mat", GTcls=structure)
    write_list(root / sbd / "train.txt", *SBD_TRAIN)
    write_list(root / sbd / "val.txt", *SBD_VAL)
    return root


CONTEXT = {"train": ("2008_000002", "2008_000003", "2008_000007"), "val": ("2008_000008",)}


def make_context(root, mat=True):
    top = root / "VOCdevkit" / "VOC2010"
    for part, names in CONTEXT.items():
        write_list(top / "ImageSets" / ("Main" if mat else "SegmentationContext") / f"{part}.txt")
        for name in names:
            write_image(top / "JPEGImages" / f"{name}.jpg")
            if mat:
                labels = grid(0, 1, 2, 9, 300, 431, 458, 459).astype(np.uint16)
                write_mat(root / "trainval" / f"{name}.mat", LabelMap=labels)
            else:
                write_mask(top / "SegmentationClassContext" / f"{name}.png", grid(0, 1, 2, 59))
        folder = top / "ImageSets" / ("Main" if mat else "SegmentationContext")
        write_list(folder / f"{part}.txt", *names)
        write_list(folder / f"aeroplane_{part}.txt", *(f"{name} -1" for name in names))
    return root


def make_coco10k(root, labels=(0, *CLASS_IDS)):
    parts = {"train": (77, 81, 92), "test": (109,)}
    for part, numbers in parts.items():
        names = [f"COCO_train2014_{number:012}" for number in numbers]
        write_list(root / "imageLists" / f"{part}.txt", *names)
        for name in names:
            write_image(root / "images" / f"{name}.jpg", (len(labels), 2))
            write_mat(
                root / "annotations" / f"{name}.mat",
                S=np.array(labels, dtype=np.float64)[:, None].repeat(2, axis=1),
                names=np.array([["person"], ["wood"]], dtype=object),
                regionLabelsStuff=np.array([[92.0], [0.0]]),
            )
    return root


def make_coco164k(root, codes=(255, *(i - 1 for i in CLASS_IDS))):
    for part, numbers in {"train2017": (9, 25, 30), "val2017": (139,)}.items():
        for name in (f"{number:012}" for number in numbers):
            write_image(root / part / f"{name}.jpg", (len(codes), 1))
            mask = root / "stuffthingmaps_trainval2017" / part / f"{name}.png"
            write_mask(mask, np.array(codes)[:, None])
    return root


def make_lip(root):
    for part, count in (("train", 3), ("val", 2)):
        for name in (f"{number}_{1234574 + number}" for number in range(count)):
            write_image(root / "TrainVal_images" / f"{part}_images" / f"{name}.jpg")
            folder = root / "TrainVal_parsing_annotations" / f"{part}_segmentations"
            write_mask(folder / f"{name}.png", grid(*range(20)))
        write_list(root / "TrainVal_images" / f"{part}_id.txt", "0_1234574")
    return root


MAKERS = {
    ADE20K: make_ade20k,
    LIP: make_lip,
    VOC: make_voc,
    Cityscapes: make_cityscapes,
    COCOStuff10k: make_coco10k,
    COCOStuff164k: make_coco164k,
    PascalContext: make_context,
}
