"""Every data set on a tiny copy of its official layout: pairs, codes, facts, errors."""

import pickle
import re

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from layouts import (
    CONTEXT,
    MAKERS,
    SIZE,
    VOC_TRAIN,
    VOC_VAL,
    grid,
    make_ade20k,
    make_cityscapes,
    make_coco10k,
    make_coco164k,
    make_context,
    make_lip,
    make_voc,
    write_mask,
    write_mat,
)
from PIL import ExifTags, Image
from scipy.io import savemat

from isanet_pl.data import (
    ADE20K,
    LIP,
    VOC,
    CamVid,
    Cityscapes,
    COCOStuff10k,
    COCOStuff164k,
    PascalContext,
    SegmentationDataModule,
    SegmentationFolder,
    Synthetic,
)
from isanet_pl.data.archives import read_mat
from isanet_pl.data.coco_stuff import CLASS_IDS
from isanet_pl.data.dataset import PairDataset, code_table
from isanet_pl.errors import InputError

OFFICIAL = (ADE20K, LIP, VOC, Cityscapes, COCOStuff10k, COCOStuff164k, PascalContext)
FACTS = (*OFFICIAL, CamVid, Synthetic)


def build(data_class, root, **arguments):
    return data_class(root=str(root), num_workers=0, **arguments)


def plain(data, split):
    """Returns the samples of a split as they are in the files."""
    table = code_table(data.num_classes, data.label_map, data.reduce_zero_label)
    return PairDataset(data.list_pairs(split), table, data.num_classes, read_codes=data.read_codes)


def classes(data, split="val"):
    """Returns the class map (H, W) of the first sample of a split."""
    return plain(data, split)[0]["mask"].numpy()


def stems(data, split):
    return [image.name.partition(".")[0] for image, _ in data.list_pairs(split)]


# Facts


@pytest.mark.parametrize(
    ("data_class", "num_classes"),
    [
        (ADE20K, 150),
        (LIP, 20),
        (VOC, 21),
        (Cityscapes, 19),
        (COCOStuff10k, 171),
        (COCOStuff164k, 171),
        (PascalContext, 60),
        (CamVid, 11),
        (Synthetic, 5),
    ],
)
def test_every_class_has_a_name_and_a_colour(data_class, num_classes):
    assert len(data_class.class_names) == len(data_class.palette) == num_classes
    assert len(set(data_class.class_names)) == num_classes
    assert all(name == name.strip() and name for name in data_class.class_names)
    assert all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in data_class.palette)


SAME_COLOUR = {ADE20K: {"road", "skyscraper"}, PascalContext: {"bicycle", "snow"}}


@pytest.mark.parametrize("data_class", FACTS)
def test_classes_share_a_colour_only_where_the_benchmark_has_it_so(data_class):
    palette = list(data_class.palette)
    pairs = zip(data_class.class_names, palette, strict=True)
    assert {n for n, c in pairs if palette.count(c) > 1} == SAME_COLOUR.get(data_class, set())


@pytest.mark.parametrize("data_class", OFFICIAL)
def test_the_docstring_says_where_to_get_it_and_whom_to_cite(data_class):
    text = " ".join(data_class.__doc__.split())
    for word in ("Get ", "`root`", "Cite: ", "erms", "`val`" if "10k" in text else "`test` eval"):
        assert word in text
    assert data_class.homepage.startswith("http")
    assert set(data_class.num_images) == {"train", "val"}


def test_some_facts_of_the_lists():
    assert ADE20K.class_names[0] == "wall"
    assert ADE20K.class_names[149] == "flag"
    assert VOC.palette[15] == (192, 128, 128)  # person
    assert VOC.class_names[20] == "tvmonitor"
    assert Cityscapes.class_names[13] == "car"
    assert PascalContext.class_names[0] == "background"
    assert COCOStuff10k.class_names[80] == "banner"  # after the 80 things
    assert len(CLASS_IDS) == 171
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91} & set(CLASS_IDS)


# What all of them share


@pytest.mark.parametrize("data_class", OFFICIAL)
def test_pairs_are_there_and_test_is_val(tmp_path, data_class):
    data = build(data_class, MAKERS[data_class](tmp_path))
    for split in ("train", "val"):
        pairs = data.list_pairs(split)
        assert pairs
        assert all(image.is_file() and mask.is_file() for image, mask in pairs)
        assert [i.name.split(".")[0].split("_left")[0] for i, _ in pairs] == [
            m.name.split(".")[0].split("_gt")[0] for _, m in pairs
        ]
        assert len(set(pairs)) == len(pairs)
    assert data.list_pairs("test") == data.list_pairs("val")
    assert not set(data.list_pairs("train")) & set(data.list_pairs("val"))


@pytest.mark.parametrize("data_class", OFFICIAL)
def test_batches_come_out_of_the_loaders(tmp_path, data_class):
    data = build(data_class, MAKERS[data_class](tmp_path), batch_size=2, crop_size=(16, 24))
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 24)
    assert batch["mask"].shape == (2, 16, 24)
    assert batch["mask"].dtype == torch.uint8
    for batch in data.val_dataloader():
        seen = set(batch["mask"].unique().tolist())
        assert seen <= {*range(data.num_classes), 255}
    assert pickle.loads(pickle.dumps(data.build_dataset("val")))[0]["mask"] is not None


@pytest.mark.parametrize("data_class", [*OFFICIAL, CamVid])
def test_the_command_line_knows_it(data_class):
    parser = ArgumentParser()
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    config = parser.parse_args(
        ["--data", data_class.__name__, "--data.root", "somewhere", "--data.flip", "false"]
    )
    assert config.data.class_path.rpartition(".")[2] == data_class.__name__
    assert (config.data.init_args.root, config.data.init_args.flip) == ("somewhere", False)


MISSING = [
    (ADE20K, "ADEChallengeData2016/images/validation", "val"),
    (ADE20K, "ADEChallengeData2016/annotations/training", "train"),
    (LIP, "TrainVal_images", "val"),
    (LIP, "TrainVal_parsing_annotations/train_segmentations", "train"),
    (VOC, "VOCdevkit/VOC2012/JPEGImages", "val"),
    (VOC, "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "val"),
    (VOC, "benchmark_RELEASE", "train"),
    (Cityscapes, "leftImg8bit/train", "train"),
    (Cityscapes, "gtFine", "val"),
    (COCOStuff10k, "imageLists", "train"),
    (COCOStuff10k, "annotations", "val"),
    (COCOStuff164k, "val2017", "val"),
    (COCOStuff164k, "stuffthingmaps_trainval2017", "train"),
    (PascalContext, "trainval", "train"),
    (PascalContext, "VOCdevkit/VOC2010/ImageSets", "val"),
]


@pytest.mark.parametrize(("data_class", "missing", "split"), MISSING)
def test_what_is_missing_is_named_and_where_to_get_it(tmp_path, data_class, missing, split):
    root = MAKERS[data_class](tmp_path / "data")
    (root / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as error:
        build(data_class, root).list_pairs(split)
    message = str(error.value)
    assert message.startswith(f"not found: {root}")
    assert "get it from http" in message
    assert missing.rpartition("/")[2].removesuffix("_RELEASE") in message


@pytest.mark.parametrize("data_class", OFFICIAL)
@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_the_archive_should_have_is_named(tmp_path, data_class, side):
    data = build(data_class, MAKERS[data_class](tmp_path))
    gone = data.list_pairs("train")[1][side]
    gone.unlink()
    if side == 0 and data_class in (COCOStuff164k, Cityscapes):
        assert gone not in [image for image, _ in data.list_pairs("train")]  # images are the list
        return
    with pytest.raises(InputError) as error:
        data.list_pairs("train")
    assert str(gone.parent) in str(error.value)
    assert gone.stem in str(error.value)


def test_root_is_asked_for_by_name():
    with pytest.raises(InputError, match=r"Cityscapes needs its folder: --data\.root"):
        Cityscapes().list_pairs("train")


# ADE20K


@pytest.mark.parametrize("inside", [False, True])
def test_ade20k_takes_the_folder_or_the_one_above(tmp_path, inside):
    make_ade20k(tmp_path)
    data = build(ADE20K, tmp_path / "ADEChallengeData2016" if inside else tmp_path)
    assert stems(data, "train") == [f"ADE_train_0000000{i}" for i in (1, 2, 3)]
    assert stems(data, "val") == ["ADE_val_00000001", "ADE_val_00000002"]
    assert np.array_equal(classes(data), grid(255, 0, 74, 149))


def test_ade20k_refuses_a_label_that_it_does_not_have(tmp_path):
    make_ade20k(tmp_path)
    wrong = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    write_mask(wrong, grid(0, 150, 151))
    with pytest.raises(InputError, match=f"{re.escape(str(wrong))} holds the value 151,"):
        build(ADE20K, tmp_path).build_dataset("val")


# Cityscapes

TRAIN_IDS = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, *range(6, 16)]
TRAIN_IDS += [255, 255, 16, 17, 18]


def test_cityscapes_translates_label_ids(tmp_path):
    data = build(Cityscapes, make_cityscapes(tmp_path))
    assert len(TRAIN_IDS) == 34
    assert np.array_equal(classes(data), grid(*TRAIN_IDS))
    assert stems(data, "train") == [
        f"{city}_{frame}_leftImg8bit"
        for city in ("aachen", "bremen")
        for frame in ("000000_000073", "000001_000019")
    ]
    assert len(data.list_pairs("val")) == 2


def test_cityscapes_reads_ready_made_train_ids(tmp_path):
    make_cityscapes(tmp_path, "labelTrainIds", (*range(19), 255))
    data = build(Cityscapes, tmp_path, labels="labelTrainIds")
    assert np.array_equal(classes(data), grid(*range(19), 255))
    with pytest.raises(InputError, match=r"_gtFine_labelIds\.png"):
        build(Cityscapes, tmp_path).list_pairs("val")


@pytest.mark.parametrize("labels", ["labelIds", "labelTrainIds"])
def test_cityscapes_refuses_ids_of_the_other_kind_or_none(tmp_path, labels):
    make_cityscapes(tmp_path, labels, (0, 34) if labels == "labelIds" else (0, 19))
    data = build(Cityscapes, tmp_path, labels=labels)
    with pytest.raises(InputError, match=rf"_gtFine_{labels}\.png holds the value (34|19),"):
        data.build_dataset("val")


def test_cityscapes_coarse_comes_on_top_without_the_black_frame(tmp_path):
    root = make_cityscapes(tmp_path)
    fine, data = build(Cityscapes, root), build(Cityscapes, root, coarse=True)
    pairs = data.list_pairs("train")
    assert pairs[:4] == fine.list_pairs("train")
    assert [mask.name for _, mask in pairs[4:]] == [
        "augsburg_000000_000073_gtCoarse_labelIds.png",
        "augsburg_000001_000019_gtCoarse_labelIds.png",
        "troisdorf_000001_000019_gtCoarse_labelIds.png",
    ]
    assert np.array_equal(plain(data, "train")[6]["mask"].numpy(), grid(*TRAIN_IDS))
    assert data.list_pairs("val") == fine.list_pairs("val")
    assert data.num_images == {"train": 22972, "val": 500}
    (root / "gtCoarse").rename(root / "elsewhere")
    with pytest.raises(InputError, match="gtCoarse/train_extra; get it from"):
        data.list_pairs("train")


def test_files_of_the_system_are_no_images(tmp_path):
    root = make_cityscapes(tmp_path)
    before = build(Cityscapes, root).list_pairs("train")
    for name in (".ipynb_checkpoints", "@eaDir"):
        (root / "leftImg8bit" / "train" / name).mkdir()
    image = before[0][0]
    image.with_name(f"._{image.name}").write_bytes(b"of macOS")
    assert build(Cityscapes, root).list_pairs("train") == before


def test_cityscapes_wants_every_city_to_have_its_masks(tmp_path):
    root = make_cityscapes(tmp_path)
    (root / "gtFine" / "train" / "bremen").rename(root / "bremen")
    with pytest.raises(InputError, match=r"folder not found: .*gtFine/train/bremen"):
        build(Cityscapes, root).list_pairs("train")
    for city in (root / "leftImg8bit" / "val").iterdir():
        city.rename(root / city.name)
    with pytest.raises(InputError, match=r"no folder of a city in .*leftImg8bit/val"):
        build(Cityscapes, root).list_pairs("val")


# VOC


@pytest.mark.parametrize("inside", [False, True])
def test_voc_train_is_merged_with_sbd(tmp_path, inside):
    make_voc(tmp_path)
    root = tmp_path / "VOCdevkit/VOC2012" if inside else tmp_path
    data = build(VOC, root, sbd_root=str(tmp_path) if inside else None)
    pairs = data.list_pairs("train")
    # SBD's 2008_000009 is in VOC's val; of two masks VOC's own is taken.
    assert {image.stem: mask.suffix for image, mask in pairs} == {
        "2007_000032": ".png",
        "2007_000039": ".png",
        "2008_000002": ".mat",
        "2008_000003": ".mat",
        "2008_000008": ".png",
    }
    assert len(pairs) == 5
    assert pairs == sorted(pairs)
    assert stems(data, "val") == list(VOC_VAL)
    assert data.num_images["train"] == 10582


def test_voc_masks_of_both_kinds_are_read_exactly(tmp_path):
    data = build(VOC, make_voc(tmp_path))
    samples = plain(data, "train")
    assert np.array_equal(samples[0]["mask"].numpy(), grid(*range(21), 255))  # a palette PNG
    assert np.array_equal(samples[2]["mask"].numpy(), grid(*range(21)))  # a .mat


@pytest.mark.parametrize("sbd", ["", "benchmark_RELEASE", "benchmark_RELEASE/dataset"])
def test_sbd_may_lie_elsewhere(tmp_path, sbd):
    make_voc(tmp_path)
    (tmp_path / "benchmark_RELEASE").rename(tmp_path / "moved")
    (tmp_path / "other").mkdir()
    (tmp_path / "moved").rename(tmp_path / "other" / "benchmark_RELEASE")
    data = build(VOC, tmp_path, sbd_root=str(tmp_path / "other" / sbd))
    assert len(data.list_pairs("train")) == 5


def test_voc_alone_needs_no_sbd(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "benchmark_RELEASE").rename(tmp_path / "elsewhere")
    data = build(VOC, tmp_path, augmented=False)
    assert stems(data, "train") == list(VOC_TRAIN)
    assert data.num_images == {"train": 1464, "val": 1449}
    with pytest.raises(InputError, match=r"SBD.*--data\.sbd_root DIR.*--data\.augmented false"):
        build(VOC, tmp_path).list_pairs("train")


def test_voc_refuses_wrong_classes_in_png_and_mat(tmp_path):
    data = build(VOC, make_voc(tmp_path))
    images = {image.stem: mask for image, mask in data.list_pairs("train")}
    write_mask(images["2007_000039"], grid(0, 21), palette=True)
    with pytest.raises(InputError, match=r"2007_000039\.png holds the value 21,"):
        plain(data, "train")[1]
    write_mat(images["2008_000002"], GTcls={"Segmentation": grid(0, 300).astype(np.uint16)})
    with pytest.raises(InputError, match=r"2008_000002\.mat holds the value 300,"):
        plain(data, "train")[2]


def test_voc_mat_of_another_size_is_refused(tmp_path):
    data = build(VOC, make_voc(tmp_path))
    write_mat(data.list_pairs("train")[2][1], GTcls={"Segmentation": np.zeros((5, 8), np.uint8)})
    with pytest.raises(InputError, match=r"2008_000002\.mat is 8x5"):
        data.build_dataset("train")


# PASCAL-Context


def test_context_labels_become_60_or_59_classes(tmp_path):
    make_context(tmp_path)
    # 0, 1 (accordion), 2 (aeroplane), 9 (bag), 300, 431 (unknown), 458 (wood), 459 (wool)
    with_background = build(PascalContext, tmp_path)
    assert np.array_equal(classes(with_background), grid(0, 0, 1, 2, 0, 0, 59, 0))
    without = build(PascalContext, tmp_path, background=False)
    assert np.array_equal(classes(without), grid(255, 255, 0, 1, 255, 255, 58, 255))
    assert (with_background.num_classes, without.num_classes) == (60, 59)
    assert without.class_names == with_background.class_names[1:]
    assert list(without.palette) == list(with_background.palette[1:])
    assert stems(without, "train") == list(CONTEXT["train"])


def test_context_reads_prepared_png_masks(tmp_path):
    make_context(tmp_path, mat=False)
    assert np.array_equal(classes(build(PascalContext, tmp_path)), grid(0, 1, 2, 59))
    data = build(PascalContext, tmp_path / "VOCdevkit/VOC2010", background=False)
    assert np.array_equal(classes(data), grid(255, 0, 1, 58))
    assert stems(data, "train") == list(CONTEXT["train"])


@pytest.mark.parametrize(
    ("mat", "documented"),
    [(True, {"train": 4998, "val": 5105}), (False, {"train": 4996, "val": 5104})],
)
def test_context_documents_the_images_of_the_lists_it_reads(tmp_path, mat, documented):
    data = build(PascalContext, make_context(tmp_path, mat))
    data.list_pairs("train")
    assert data.num_images == documented


def test_context_takes_the_folder_voc2010_as_well(tmp_path):
    top = make_context(tmp_path) / "VOCdevkit" / "VOC2010"
    (tmp_path / "trainval").rename(top / "trainval")
    for root in (tmp_path, tmp_path / "VOCdevkit", top):
        assert np.array_equal(classes(build(PascalContext, root)), grid(0, 0, 1, 2, 0, 0, 59, 0))


def test_context_refuses_a_label_above_459(tmp_path):
    data = build(PascalContext, make_context(tmp_path))
    write_mat(data.list_pairs("val")[0][1], LabelMap=grid(2, 460).astype(np.uint16))
    with pytest.raises(InputError, match=r"2008_000008\.mat holds the value 460,"):
        data.build_dataset("val")


# COCO-Stuff


def test_coco_stuff_10k_leaves_the_gaps_out(tmp_path):
    data = build(COCOStuff10k, make_coco10k(tmp_path))
    assert classes(data)[:, 0].tolist() == [255, *range(171)]
    assert stems(data, "train") == [f"COCO_train2014_{i:012}" for i in (77, 81, 92)]
    assert stems(data, "val") == ["COCO_train2014_000000000109"]


def test_coco_stuff_10k_may_lie_in_dataset(tmp_path):
    make_coco10k(tmp_path / "dataset")
    assert len(build(COCOStuff10k, tmp_path).list_pairs("train")) == 3


def test_coco_stuff_164k_leaves_the_gaps_out(tmp_path):
    data = build(COCOStuff164k, make_coco164k(tmp_path))
    assert classes(data)[:, 0].tolist() == [255, *range(171)]
    assert stems(data, "train") == ["000000000009", "000000000025", "000000000030"]
    # Files that other tools put beside the masks do not matter.
    extra = tmp_path / "stuffthingmaps_trainval2017/train2017/000000000009_labelTrainIds.png"
    write_mask(extra, grid(0))
    assert len(data.list_pairs("train")) == 3


def test_coco_stuff_164k_as_its_page_unpacks_it(tmp_path):
    make_coco164k(tmp_path)
    (tmp_path / "stuffthingmaps_trainval2017").rename(tmp_path / "annotations")
    (tmp_path / "images").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / part).rename(tmp_path / "images" / part)
    assert len(build(COCOStuff164k, tmp_path).list_pairs("train")) == 3


@pytest.mark.parametrize("gap", [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91])
def test_coco_stuff_refuses_the_ids_of_removed_things(tmp_path, gap):
    ten = build(COCOStuff10k, make_coco10k(tmp_path / "10k", (1, gap, 182)))
    with pytest.raises(InputError, match=rf"\.mat holds the value {gap},"):
        ten.build_dataset("val")
    full = build(COCOStuff164k, make_coco164k(tmp_path / "164k", (0, gap - 1, 181)))
    with pytest.raises(InputError, match=rf"\.png holds the value {gap - 1},"):
        full.build_dataset("val")


def test_coco_stuff_names_its_classes():
    at = dict(zip(CLASS_IDS, COCOStuff10k.class_names, strict=True))
    assert at[1] == "person"
    assert at[13] == "stop sign"
    assert at[90] == "toothbrush"
    assert at[92] == "banner"
    assert at[182] == "wood"
    assert COCOStuff10k.label_map[0] == 255
    assert 255 not in COCOStuff164k.label_map.values()
    assert COCOStuff164k.label_map[0] == 0


# LIP


@pytest.mark.parametrize("layout", ["official", "nested", "flat"])
def test_lip_in_the_layouts_of_its_archives(tmp_path, layout):
    make_lip(tmp_path)
    for archive in ("TrainVal_images", "TrainVal_parsing_annotations"):
        top = tmp_path / archive
        if layout == "nested":
            top.rename(tmp_path / "inner")
            top.mkdir()
            (tmp_path / "inner").rename(top / archive)
        elif layout == "flat":
            for folder in [entry for entry in top.iterdir() if entry.is_dir()]:
                folder.rename(tmp_path / folder.name)
    data = build(LIP, tmp_path)
    assert stems(data, "train") == ["0_1234574", "1_1234575", "2_1234576"]
    assert len(data.list_pairs("val")) == 2
    assert np.array_equal(classes(data), grid(*range(20)))


def test_lip_mirrors_left_into_right(tmp_path):
    def masks(**arguments):
        data = build(
            LIP, tmp_path, crop_size=SIZE, scale_range=(1, 1), photometric=False, **arguments
        )
        samples = data.build_dataset("train")
        return [samples[0]["mask"].numpy() for _ in range(40)]

    make_lip(tmp_path)
    straight = grid(*range(20))
    left_and_right = [*range(14), 15, 14, 17, 16, 19, 18]
    mirrored = grid(*left_and_right)[:, ::-1]
    torch.manual_seed(0)
    seen = masks()
    assert {mask.tobytes() for mask in seen} == {
        straight.astype(np.uint8).tobytes(),
        *(mirrored.astype(np.uint8).copy().tobytes(),),
    }
    assert all(np.array_equal(mask, straight) for mask in masks(flip=False))
    for left, right in LIP.mirrored_classes:
        assert LIP.class_names[left].replace("Left", "Right") == LIP.class_names[right]


def test_mirroring_leaves_the_classes_of_others_alone(tmp_path):
    make_ade20k(tmp_path)
    data = build(ADE20K, tmp_path, crop_size=SIZE, scale_range=(1, 1), photometric=False)
    samples = data.build_dataset("train")
    expected = grid(255, 0, 74, 149).astype(np.uint8)
    assert {samples[0]["mask"].numpy().tobytes() for _ in range(40)} == {
        expected.tobytes(),
        expected[:, ::-1].copy().tobytes(),
    }


# MATLAB files


def test_mat_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.mat"
    with pytest.raises(InputError, match=f"file not found: {re.escape(str(path))}"):
        read_mat(path, "S")
    for content in (b"", b"<html>404 not found</html>" * 20, b"\0" * 300):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{re.escape(str(path))}.*(restore|no matrix S)"):
            read_mat(path, "S")
    savemat(path, {"S": np.random.default_rng(0).integers(0, 9, (90, 90))}, do_compression=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot read .*restore or remove"):
        read_mat(path, "S")


def test_mat_files_of_something_else_are_named(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"labels": np.zeros((2, 2)), "S": "text", "GTcls": {"Boundaries": 1}})
    for name in (("LabelMap",), ("S",), ("GTcls", "Segmentation"), ("labels", "Segmentation")):
        wanted = re.escape(f"{path} holds no matrix {'.'.join(name)};")
        with pytest.raises(InputError, match=wanted):
            read_mat(path, *name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64, np.int32])
def test_mat_codes_keep_their_values(tmp_path, dtype):
    values = np.array([[0, 1, 182], [3, 255, 7]]).astype(dtype)
    savemat(tmp_path / "a.mat", {"S": values})
    codes = read_mat(tmp_path / "a.mat", "S")
    assert codes.dtype == (np.uint8 if dtype == np.uint8 else np.int64)
    assert np.array_equal(codes, values)


# Images of all kinds, in a folder of one's own


def folder_with(tmp_path, save, suffix, codes, **arguments):
    """Returns a SegmentationFolder whose one val image `save` writes."""
    image = tmp_path / "val" / "images" / f"a{suffix}"
    image.parent.mkdir(parents=True)
    save(image)
    mask = tmp_path / "val" / "masks" / "a.png"
    mask.parent.mkdir(parents=True)
    codes.save(mask)
    return build(SegmentationFolder, tmp_path, class_names=["dark", "light"], **arguments)


HALVES = np.zeros((5, 8), np.uint8)
HALVES[:, 4:] = 1  # dark on the left, light on the right


def assert_aligned(data):
    """The image is dark where the mask says so."""
    sample = data.build_dataset("val")[0]
    image, mask = sample["image"].float().mean(dim=0), sample["mask"]
    assert image.shape == mask.shape
    assert image[mask == 0].max() < 90
    assert image[mask == 1].min() > 160
    assert {*mask.unique().tolist()} == {0, 1}
    return sample


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (33, 31)])
def test_odd_sizes(tmp_path, size):
    codes = np.ones(size, np.uint8)
    data = folder_with(tmp_path, Image.fromarray(codes * 200).save, ".png", Image.fromarray(codes))
    sample = data.build_dataset("val")[0]
    assert sample["image"].shape == (3, *size)
    assert sample["mask"].shape == size


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_of_any_colour_mode(tmp_path, mode):
    # Blocks of 8 pixels, so that JPEG keeps the edge sharp.
    halves = np.kron(HALVES, np.ones((8, 8), np.uint8))
    picture = Image.fromarray(halves * 190 + 30).convert("RGB").convert(mode)
    data = folder_with(
        tmp_path, lambda p: picture.save(p, quality=95), ".jpg", Image.fromarray(halves)
    )
    assert Image.open(tmp_path / "val/images/a.jpg").mode == mode
    assert assert_aligned(data)["image"].shape == (3, 40, 64)


def test_sixteen_bits_in_image_and_mask(tmp_path):
    grey = HALVES.astype(np.uint16) * 190 * 256 + 7000
    data = folder_with(
        tmp_path, Image.fromarray(grey).save, ".png", Image.fromarray(HALVES.astype(np.uint16))
    )
    assert Image.open(tmp_path / "val/masks/a.png").mode == "I;16"
    assert assert_aligned(data)["image"][0].tolist() == (grey >> 8).tolist()


def test_code_of_a_sixteen_bit_mask_outside_the_list(tmp_path):
    wide = Image.fromarray(HALVES.astype(np.uint16) * 256)
    data = folder_with(tmp_path, Image.fromarray(HALVES).save, ".png", wide)
    with pytest.raises(InputError, match=r"a\.png holds the value 256,"):
        data.build_dataset("val")


UPRIGHT = {  # what a camera stores for each orientation, so that a viewer shows HALVES
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a[:, ::-1].T,
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a[::-1].T,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_turned_image_stays_aligned_with_its_mask(tmp_path, orientation, suffix):
    corner = HALVES.copy()
    corner[0] = 0  # so that up and down differ, too
    codes = np.kron(corner, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](codes * 190 + 30)))
    data = folder_with(
        tmp_path, lambda p: stored.save(p, exif=exif), suffix, Image.fromarray(codes)
    )
    sample = assert_aligned(data)
    assert np.array_equal(sample["mask"].numpy(), codes)


def test_label_zero_and_255_are_told_apart(tmp_path):
    codes = np.array([[0, 1, 2, 255]], np.uint8)
    picture = Image.fromarray(codes)
    data = folder_with(tmp_path, picture.save, ".png", picture, reduce_zero_label=True)
    assert data.build_dataset("val")[0]["mask"].tolist() == [[255, 0, 1, 255]]
    data.reduce_zero_label = False
    with pytest.raises(InputError, match=r"a\.png holds the value 2,"):
        data.build_dataset("val")
    data.label_map = {0: 255, 1: 1, 2: 0}
    assert data.build_dataset("val")[0]["mask"].tolist() == [[255, 1, 0, 255]]
