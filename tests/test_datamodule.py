"""Data sets from files to batches, and what is said when the files are wrong."""

import shutil

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import fails_naming, make_camvid, make_folder, make_scene, truncate
from PIL import Image

from isanet_pl.data import CamVid, SegmentationFolder
from isanet_pl.data.cache import DecodedCache
from isanet_pl.data.colours import Jitter, distort
from isanet_pl.data.dataset import ImageDataset, code_table
from isanet_pl.data.files import INVALID, read_mask
from isanet_pl.data.palette import default_palette
from isanet_pl.errors import InputError

NAMES = ["road", "car", "tree"]


def make_data(root, stage=None, names=NAMES, **arguments):
    """Returns a SegmentationFolder in this process, set up for a stage if one is given."""
    arguments = {"batch_size": 2, "crop_size": (16, 20), "num_workers": 0, **arguments}
    data = SegmentationFolder(root and str(root), names, **arguments)
    if stage:
        data.setup(stage)
    return data


def write_mask(path, value, where=(5, 6)):
    """Puts one value into one pixel of a mask file."""
    mask = np.array(Image.open(path))
    mask[where] = value
    Image.fromarray(mask).save(path)


# From files to batches


def test_train_batches(folder):
    data = make_data(folder, "fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "mask", "name", "jitter"}
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert batch["image"].shape == (2, 3, 16, 20)
    assert batch["mask"].shape == (2, 16, 20)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 255}
    scenes = {str(folder / "train" / "images" / f"scene{i}.png") for i in range(3)}
    assert len(set(batch["name"]) & scenes) == 2


def test_images_of_a_batch_lie_as_convolutions_want_them(folder):
    data = make_data(folder, "fit")
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)


def test_colours_change_on_the_device_and_with_their_own_jitter(folder):
    data = make_data(folder, "fit")
    batch = next(iter(data.train_dataloader()))
    plain, jitters = batch["image"].clone(), batch["jitter"]
    bright = Jitter(brightness=20.0)
    changed = data.on_after_batch_transfer({**batch, "jitter": [Jitter(), bright]}, 0)
    assert set(changed) == {"image", "mask", "name"}
    assert torch.equal(changed["image"][0], plain[0])
    assert torch.equal(changed["image"][1], distort(plain[1], bright))
    assert not torch.equal(changed["image"][1], plain[1])
    assert changed["image"].is_contiguous(memory_format=torch.channels_last)
    assert all(isinstance(jitter, Jitter) for jitter in jitters)


def test_padding_keeps_its_colour(folder):
    data = make_data(folder, "fit", crop_size=(64, 80), scale_range=(0.5, 1.0))
    for batch in data.train_dataloader():
        plain = batch["image"].clone()
        sizes = [(jitter.height, jitter.width) for jitter in batch["jitter"]]
        bright = [Jitter(brightness=40.0, height=h, width=w) for h, w in sizes]
        image = data.on_after_batch_transfer({**batch, "jitter": bright}, 0)["image"]
        for number, (height, width) in enumerate(sizes):
            assert (batch["mask"][number, height:] == 255).all()
            assert (batch["mask"][number, :, width:] == 255).all()
            same = image[number] == plain[number]
            assert same[:, height:].all()
            assert same[:, :, width:].all()
            assert not same[:, :height, :width].any(0).all()


def test_without_photometric_there_is_no_jitter(folder):
    data = make_data(folder, "fit", photometric=False)
    evaluated = make_data(folder, "fit")  # with the change of colours on
    for batch in (
        next(iter(data.train_dataloader())),
        next(iter(data.val_dataloader())),
        next(iter(evaluated.val_dataloader())),
    ):
        assert "jitter" not in batch
        image = batch["image"].clone()
        assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], image)


def test_a_training_run_sees_changed_colours(folder):
    class Looking(pl.LightningModule):
        def training_step(self, batch, _):
            assert "jitter" not in batch
            self.images.append(batch["image"].clone())

        def configure_optimizers(self):
            return None

    seen = []
    for photometric in (False, True):
        module = Looking()
        module.images = []
        data = make_data(folder, photometric=photometric, flip=False, scale_range=(1, 1))
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(max_epochs=1, accelerator="cpu", limit_val_batches=0, **options).fit(
            module, datamodule=data
        )
        seen.append(torch.cat(module.images).float().mean((2, 3)))
    assert (seen[0] - seen[1]).abs().max() > 5


def test_without_validation_no_validation_images_are_needed(tmp_path):
    data = make_data(make_folder(tmp_path, splits=("train",)))
    data.trainer = pl.Trainer(accelerator="cpu", limit_val_batches=0, logger=False)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["name"]) == 2
    data.trainer.limit_val_batches = 1.0
    with pytest.raises(InputError, match="val"):
        data.setup("fit")


def test_images_of_several_sizes_make_no_batch(tmp_path):
    folder = make_folder(tmp_path / "data")
    make_folder(tmp_path / "wide", size=(24, 50))
    for kind in ("images", "masks"):
        name = f"val/{kind}/scene0.png"
        shutil.copy(tmp_path / "wide" / name, folder / name)
    data = make_data(folder, "validate", eval_batch_size=2)
    with fails_naming("several sizes (32x24, 50x24)", "--data.eval_batch_size 1"):
        next(iter(data.val_dataloader()))


def test_a_crop_of_a_part_of_the_file_is_that_of_the_whole_file(tmp_path):
    """Training reads a PNG no further than the crop needs."""
    data = make_data(make_folder(tmp_path / "data", size=(90, 60)), "fit", crop_size=(20, 20))
    dataset = data._datasets["train"]
    tops = set()
    for number in range(60):
        torch.manual_seed(number)
        sample = dataset[number % 3]
        torch.manual_seed(number)
        image, mask = dataset.decode(dataset.pairs[number % 3])
        window = dataset.transform.draw(mask)
        image, mask = dataset.transform.cut(image, mask, window)
        assert torch.equal(sample["image"], image)
        assert torch.equal(sample["mask"], mask)
        tops.add(window.top + window.height)
    assert len(tops) > 20


def test_a_size_that_changes_after_the_start_is_named(folder):
    data = make_data(folder, "fit", crop_size=(4, 4), scale_range=(1, 1))
    for path in (folder / "train" / "images").iterdir():
        Image.fromarray(make_scene(0, (30, 32), [0])[0]).save(path)
    with fails_naming("is 32x30", "is 32x24"):
        data._datasets["train"][0]


# The cache


def draws(data, count=6):
    """Returns samples of both splits, the same random numbers for each."""
    samples = []
    for split in ("train", "val"):
        for number in range(count):
            torch.manual_seed(number)
            samples.append(data._datasets[split][number % 3])
    return samples


def test_cached_samples_are_those_of_the_files(folder, tmp_path):
    data = make_data(folder, "fit")
    plain = draws(data)
    for _ in range(2):  # filled, then read
        cached = draws(make_data(folder, "fit", cache=str(tmp_path / "cache")))
        for one, other in zip(plain, cached, strict=True):
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["mask"], other["mask"])
            assert one["name"] == other["name"]
            assert one.get("jitter") == other.get("jitter")
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 6


def test_cache_fills_from_loader_processes(folder, tmp_path):
    data = make_data(folder, "fit", cache=str(tmp_path / "cache"), num_workers=2)
    plain = [batch["mask"] for batch in make_data(folder, "validate").val_dataloader()]
    for _ in range(2):
        masks = [batch["mask"] for batch in data.val_dataloader()]
        assert all(torch.equal(*pair) for pair in zip(masks, plain, strict=True))
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 3


def test_cache_keeps_label_maps_apart(folder, tmp_path):
    cache = str(tmp_path / "cache")
    first = make_data(folder, "validate", cache=cache)._datasets["val"][0]["mask"]
    swap = {0: 1, 1: 0, 2: 2}
    second = make_data(folder, "validate", cache=cache, label_map=swap)._datasets["val"][0]["mask"]
    assert torch.equal(second == 1, first == 0)


def test_space_is_needed_for_all_splits_together(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(DecodedCache, "check_space", lambda self, pairs: asked.append(len(pairs)))
    make_data(folder, "fit", cache=str(tmp_path / "cache"))
    assert asked == [6]


def test_cache_keeps_readers_apart(folder, tmp_path):
    class Turned(SegmentationFolder):
        @staticmethod
        def read_codes(path):
            return np.flipud(read_mask(path)).copy()

    options = {"num_workers": 0, "cache": str(tmp_path / "cache")}
    masks = []
    for data_class in (SegmentationFolder, Turned):
        data = data_class(str(folder), NAMES, **options)
        data.setup("validate")
        masks.append(data._datasets["val"][0]["mask"])
    write_mask(folder / "val" / "masks" / "scene0.png", 2)
    assert torch.equal(masks[0].flipud(), masks[1])


def test_cache_that_cannot_be_written_is_refused_before_training(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with fails_naming("--data.cache", tmp_path / "file"):
        make_data(folder, "fit", cache=str(tmp_path / "file" / "cache"))


def test_train_split_is_shuffled_in_full_batches_that_leave_no_image_out(folder, tmp_path):
    data = make_data(make_folder(tmp_path / "five", count=5), "fit")
    loader = data.train_dataloader()
    assert len(loader) == 2
    batches = [batch["name"] for _ in range(5) for batch in loader]
    assert [len(names) for names in batches] == [2] * 10
    names = [name for batch in batches for name in batch]
    passes = [tuple(names[i : i + 5]) for i in range(0, 20, 5)]
    assert all(len(set(seen)) == 5 for seen in passes)
    assert len(set(passes)) > 1


def test_train_on_val_draws_from_both_and_evaluates_as_before(folder, caplog):
    kept, data = (make_data(folder, "fit", train_on_val=both) for both in (False, True))
    drawn = [name for batch in data.train_dataloader() for name in batch["name"]]
    files = [p for split in ("train", "val") for p in (folder / split / "images").iterdir()]
    assert sorted(drawn) == sorted(map(str, files))
    assert len(drawn) == 6
    assert len(kept.train_dataloader()) == 1
    for batch, same in zip(data.val_dataloader(), kept.val_dataloader(), strict=True):
        assert batch["name"] == same["name"]
        assert batch["image"].equal(same["image"])
    assert caplog.text.count("val scores measure nothing") == 1


def test_train_on_val_says_where_test_is_val(folder, caplog):
    class Public(SegmentationFolder):
        def list_pairs(self, split):
            return super().list_pairs("val" if split == "test" else split)

    for kind, said in ((SegmentationFolder, 0), (Public, 1)):
        caplog.clear()
        kind(root=str(folder), batch_size=1, train_on_val=True, class_names=NAMES).setup("fit")
        assert caplog.text.count("val scores and test scores, whose images are the same,") == said


def test_train_on_val_needs_space_for_each_image_once(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(DecodedCache, "check_space", lambda self, pairs: asked.extend(pairs))
    make_data(folder, "fit", train_on_val=True, cache=str(tmp_path / "cache"))
    assert len(asked) == len(set(asked)) == 6


def test_train_samples_are_augmented_and_eval_samples_are_not(folder):
    data = make_data(folder, "fit", batch_size=1, crop_size=(24, 32))
    train = [batch for _ in range(4) for batch in data.train_dataloader()]
    assert len({tuple(batch["image"].flatten().tolist()) for batch in train}) == 12
    first, second = ([b["image"] for b in data.val_dataloader()] for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("stage", "split"), [("fit", "val"), ("validate", "val"), ("test", "test")]
)
def test_eval_samples_are_the_files_at_their_own_size_in_order(tmp_path, stage, split):
    sizes = [(24, 32), (17, 40), (9, 12)]
    root = make_folder(tmp_path / "data")
    for index, size in enumerate(sizes):
        image, mask = make_scene(10 + index, size, [0, 1, 2, 255])
        Image.fromarray(image).save(root / split / "images" / f"scene{index}.png")
        Image.fromarray(mask).save(root / split / "masks" / f"scene{index}.png")
    data = make_data(root, stage)
    batches = list(data.test_dataloader() if split == "test" else data.val_dataloader())
    assert len(batches) == 3
    for index, (size, batch) in enumerate(zip(sizes, batches, strict=True)):
        image, mask = make_scene(10 + index, size, [0, 1, 2, 255])
        assert batch["image"].shape == (1, 3, *size)
        assert np.array_equal(batch["image"][0].permute(1, 2, 0), image)
        assert np.array_equal(batch["mask"][0], mask)
        assert batch["mask"].dtype == torch.uint8
        assert batch["name"] == [str(root / split / "images" / f"scene{index}.png")]


def test_eval_batches_keep_the_last_short_one(folder):
    data = make_data(folder, "validate", eval_batch_size=2)
    assert [len(batch["name"]) for batch in data.val_dataloader()] == [2, 1]


def test_each_stage_needs_only_its_own_split(tmp_path):
    data = make_data(make_folder(tmp_path / "only_test", splits=["test"]), "test")
    assert len(list(data.test_dataloader())) == 3
    data = make_data(make_folder(tmp_path / "no_test", splits=["train", "val"]), "fit")
    assert len(data.train_dataloader().dataset) == 3
    # What is set up stays so: validation after training reads no list again.
    shutil.rmtree(tmp_path / "no_test" / "val" / "masks")
    (tmp_path / "no_test" / "val" / "masks").mkdir()
    data.setup("validate")
    assert len(data.val_dataloader().dataset) == 3


def test_exif_rotation_fits_the_mask_as_displayed(folder):
    # A phone stores the picture lying on its side; the mask was drawn on the upright picture.
    image, mask = make_scene(7, (40, 20), [0, 1, 2])
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "val" / "images" / "scene1.png"
    Image.fromarray(np.rot90(image)).save(path, exif=exif)
    Image.fromarray(mask).save(folder / "val" / "masks" / "scene1.png")
    sample = list(make_data(folder, "validate").val_dataloader())[1]
    assert np.array_equal(sample["image"][0].permute(1, 2, 0), image)
    assert np.array_equal(sample["mask"][0], mask)


# Class names and colours


def test_class_names_from_the_file(folder):
    (folder / "classes.txt").write_text("road\n  car \n\ntree top\n", "utf-8")
    data = make_data(folder, "validate", names=None)
    assert list(data.class_names) == ["road", "car", "tree top"]
    assert data.num_classes == 3


def test_class_names_of_another_encoding_are_told(folder):
    (folder / "classes.txt").write_bytes("Bäume\nStraße\n".encode("latin-1"))
    with fails_naming(folder / "classes.txt", "is no UTF-8 text", "save it as UTF-8"):
        SegmentationFolder(root=str(folder))


def test_class_names_from_the_argument_win(folder):
    (folder / "classes.txt").write_text("a\nb\n")
    data = make_data(folder, "validate")
    assert list(data.class_names) == NAMES
    assert data.num_classes == len(data.palette) == 3


def test_missing_class_names(folder):
    with fails_naming("--data.class_names", folder / "classes.txt"):
        make_data(folder, names=None)


@pytest.mark.parametrize("names", [[], ["road"]])
def test_too_few_class_names(folder, names):
    with fails_naming("at least two", names):
        make_data(folder, names=names)
    (folder / "classes.txt").write_text("\n".join(names))
    with fails_naming("at least two", names):
        make_data(folder, names=None)


def test_class_name_twice(folder):
    with fails_naming("twice", ["road", "car", "road"]):
        make_data(folder, names=["road", "car", "road"])


@pytest.mark.parametrize("num_classes", [2, 21, 150])
def test_default_palette_has_one_colour_for_each_class(num_classes):
    palette = default_palette(num_classes)
    assert len(set(palette)) == len(palette) == num_classes
    assert all(0 <= part <= 255 for colour in palette for part in colour)
    voc = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]  # VOC's first four
    assert all(seen == known for seen, known in zip(palette, voc, strict=False))


# Mask codes


def test_code_table_translates_code_by_code():
    rng = np.random.default_rng(0)
    for reduce_zero_label in (False, True):
        for _ in range(50):
            num_classes = int(rng.integers(2, 30))
            codes = rng.permutation(255)[: rng.integers(1, 60)].tolist()
            classes = [*range(num_classes), 255]
            label_map = {code: int(rng.choice(classes)) for code in codes}
            table = code_table(num_classes, label_map, reduce_zero_label)
            assert table.shape == (256,)
            assert table.dtype == np.uint8
            for code in range(255):
                if reduce_zero_label:
                    expected = 255 if code == 0 else label_map.get(code - 1, INVALID)
                else:
                    expected = label_map.get(code, INVALID)
                assert table[code] == expected
            assert table[255] == 255


@pytest.mark.parametrize("num_classes", [2, 19, 150, 254])
def test_code_table_without_map_is_the_identity(num_classes):
    expected = [*range(num_classes), *[INVALID] * (255 - num_classes), 255]
    assert code_table(num_classes, None, False).tolist() == expected
    expected = [255, *range(num_classes), *[INVALID] * (254 - num_classes), 255]
    assert code_table(num_classes, None, True).tolist() == expected


@pytest.mark.parametrize(
    ("code", "index"), [(0, 3), (0, 254), (0, -1), (0, 256), (256, 0), (-1, 0), (300, 255)]
)
def test_wrong_label_map_is_named(folder, code, index):
    with fails_naming(f"label_map maps {code} to {index}", "0..2"):
        make_data(folder, "fit", label_map={1: 1, code: index})


def mask_seen(root, codes, **arguments):
    """Returns the first validation mask when the file holds these codes in its first row."""
    path = root / "val" / "masks" / "scene0.png"
    for other in path.parent.iterdir():
        Image.fromarray(np.full((24, 32), codes[0], dtype=np.uint8)).save(other)
    mask = np.full((24, 32), codes[0], dtype=np.uint8)
    mask[0, : len(codes)] = codes
    Image.fromarray(mask).save(path)
    batch = next(iter(make_data(root, "validate", **arguments).val_dataloader()))
    return batch["mask"][0, 0, : len(codes)].tolist()


def test_label_map(folder):
    label_map = {7: 0, 0: 2, 100: 1, 33: 255}
    codes = [7, 0, 100, 33, 255]
    assert mask_seen(folder, codes, label_map=label_map) == [0, 2, 1, 255, 255]
    with fails_naming(folder / "val" / "masks" / "scene0.png", "value 1,"):
        mask_seen(folder, [7, 1], label_map=label_map)  # 1 is a class, but no code of this map


def test_reduce_zero_label(folder):
    assert mask_seen(folder, [0, 1, 2, 3, 255], reduce_zero_label=True) == [255, 0, 1, 2, 255]
    with fails_naming(folder / "val" / "masks" / "scene0.png", "value 4,"):
        mask_seen(folder, [0, 4], reduce_zero_label=True)


def test_reduce_zero_label_comes_before_label_map(folder):
    both = {"label_map": {0: 1, 1: 0, 2: 255}, "reduce_zero_label": True}
    assert mask_seen(folder, [0, 1, 2, 3, 255], **both) == [255, 1, 0, 255, 255]


# CamVid


def test_camvid_layout(small_camvid):
    data = CamVid(str(small_camvid), batch_size=2, crop_size=(16, 20), num_workers=0)
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == len(data.class_names) == len(data.palette) == 11
    assert len(set(data.class_names)) == len(set(data.palette)) == 11
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 16, 20)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for index, batch in enumerate(loader):
            _, codes = make_scene(index, (24, 36), range(12))
            assert np.array_equal(batch["mask"][0], np.where(codes == 11, 255, codes))
            assert batch["image"].shape == (1, 3, 24, 36)


def test_camvid_label_outside_its_codes(small_camvid):
    path = small_camvid / "train" / "labels" / "frame1.png"
    mask = np.array(Image.open(path))
    mask[3, 3] = 12
    Image.fromarray(mask).save(path)
    with fails_naming(path, "value 12,", "11 classes"):
        CamVid(str(small_camvid), batch_size=1, num_workers=0).setup("fit")


def test_real_camvid_has_its_published_splits_and_labels(camvid_root):
    data = CamVid(str(camvid_root), num_workers=0)
    data.setup("fit")
    data.setup("test")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader.dataset) for loader in loaders] == [367, 101, 233]
    for split in ("train", "val", "test"):
        paths = sorted((camvid_root / split / "labels").glob("*.png"))
        masks = [np.array(Image.open(path)) for path in paths]
        assert {mask.shape for mask in masks} == {(360, 480)}
        # Every split has every class, and void; nothing else.
        assert np.flatnonzero(sum(np.bincount(m.flat, minlength=256) for m in masks)).tolist() == [
            *range(12)
        ]
        sample = loaders[("train", "val", "test").index(split)].dataset
        if split != "train":  # as they are in the files
            assert np.array_equal(sample[5]["mask"], np.where(masks[5] == 11, 255, masks[5]))
            assert sample[5]["image"].shape == (3, 360, 480)


# Prediction


def test_predict_finds_images_of_any_size_in_all_folders(tmp_path):
    sizes = {"a.png": (7, 13), "b/c.jpg": (31, 17), "b/d/e.png": (1, 1), "z.bmp": (64, 3)}
    for name, size in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_scene(0, size, [0, 1])[0]).save(path)
    Image.new("L", (5, 4)).save(tmp_path / "grey.png")
    sizes["grey.png"] = (4, 5)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    data = make_data(None, "predict", predict_dir=str(tmp_path), eval_batch_size=4)
    batches = list(data.predict_dataloader())
    assert all(set(batch) == {"image", "name"} for batch in batches)
    assert all(batch["image"].dtype == torch.uint8 for batch in batches)
    seen = {batch["name"][0]: tuple(batch["image"].shape) for batch in batches}
    # Results are named after the image, without its ending.
    assert seen == {name.split(".")[0]: (1, 3, *size) for name, size in sizes.items()}


def test_predict_gives_every_image_its_own_name(tmp_path):
    for name in ("a.png", "a.jpg", "b.v1.png", "b.v2.png", "c.png", "d/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    names = [sample["name"] for sample in ImageDataset(tmp_path)]
    assert sorted(names) == ["a.jpg", "a.png", "b.v1", "b.v2", "c", "d/c"]


def test_names_stay_apart_whatever_the_files_are_called(tmp_path):
    for name in ("x.jpg", "x.png", "x.jpg.png", "y.tar.png", "y.jpg"):
        Image.new("RGB", (3, 3)).save(tmp_path / name)
    names = [name for _, name in ImageDataset(tmp_path).files]
    assert len(set(names)) == 5
    assert set(names) == {"x.jpg", "x.png", "x.jpg.png", "y.tar", "y"}


def test_predict_gives_the_pixels_of_the_file(tmp_path):
    image, _ = make_scene(3, (11, 14), [0, 1, 2])
    Image.fromarray(image).save(tmp_path / "a.png")
    sample = ImageDataset(tmp_path)[0]
    assert np.array_equal(sample["image"].permute(1, 2, 0), image)


def test_predict_needs_a_folder_with_images(tmp_path):
    with fails_naming("--data.predict_dir"):
        make_data(None, "predict")
    with fails_naming(tmp_path / "nowhere"):
        make_data(None, "predict", predict_dir=str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("no image")
    with fails_naming("no file in", tmp_path, ".jpg"):
        make_data(None, "predict", predict_dir=str(tmp_path))


# Wrong folders


def test_root_not_given():
    for stage in ("fit", "validate", "test"):
        with fails_naming("SegmentationFolder", "--data.root"):
            make_data(None, stage)
        with fails_naming("CamVid", "--data.root"):
            CamVid().setup(stage)
    with fails_naming("--data.root"):
        SegmentationFolder()  # there is no file to take the class names from


def test_root_that_does_not_exist_or_is_a_file(tmp_path):
    with fails_naming("--data.root", tmp_path / "nowhere"):
        make_data(tmp_path / "nowhere", "fit")
    (tmp_path / "file").touch()
    with fails_naming("--data.root", tmp_path / "file"):
        CamVid(str(tmp_path / "file")).setup("fit")


def test_empty_root(tmp_path):
    with fails_naming(tmp_path / "train" / "images"):
        make_data(tmp_path, "fit")


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("fit", "val"), ("test", "test")])
def test_missing_split(folder, stage, split):
    shutil.rmtree(folder / split)
    with fails_naming("not found", folder / split / "images"):
        make_data(folder, stage)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_empty_or_missing_half_of_a_split(folder, part):
    for path in (folder / "val" / part).iterdir():
        path.unlink()
    with fails_naming("no file in", folder / "val" / part):
        make_data(folder, "fit")
    (folder / "val" / part).rmdir()
    with fails_naming("not found", folder / "val" / part):
        make_data(folder, "fit")


@pytest.mark.parametrize(("lost", "left"), [("masks", "images"), ("images", "masks")])
def test_file_without_partner(folder, lost, left):
    (folder / "train" / lost / "scene1.png").unlink()
    with fails_naming(folder / "train" / lost, folder / "train" / left / "scene1.png"):
        make_data(folder, "fit")


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_images_than_a_batch(tmp_path, count):
    root = make_folder(tmp_path / "data", count=count)
    with fails_naming(f"{count} images", "batch of 3", f"--data.batch_size {count}"):
        make_data(root, "fit", batch_size=3)
    make_data(root, "validate", batch_size=3)  # only training needs full batches
    data = make_data(root, "fit", batch_size=count)
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
def test_batch_sizes_must_be_positive(folder, name):
    with fails_naming("at least 1", "0"):
        make_data(folder, **{name: 0})


# Wrong files


def test_sizes_of_a_pair_differ(folder):
    mask_path = folder / "train" / "masks" / "scene1.png"
    image_path = folder / "train" / "images" / "scene1.png"
    Image.new("L", (31, 24)).save(mask_path)
    with fails_naming(image_path, "32x24", mask_path, "31x24"):
        make_data(folder, "fit")


def test_sizes_that_differ_are_found_in_any_of_many_pairs(tmp_path):
    root = make_folder(tmp_path / "data", splits=["val"], size=(6, 8), count=60)
    path = root / "val" / "masks" / "scene41.png"
    Image.new("L", (8, 7)).save(path)
    with fails_naming(path, "8x7"):
        make_data(root, "validate")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("index", range(6))
def test_wrong_mask_value_is_found_before_training(tmp_path, split, index):
    root = make_folder(tmp_path / "data", splits=["train", "val"], count=6)
    path = root / split / "masks" / f"scene{index}.png"
    write_mask(path, 77)
    with fails_naming(path, "value 77,", "3 classes"):
        make_data(root, "fit")


@pytest.mark.parametrize("value", [3, 254])
def test_first_code_that_is_no_class_is_refused(folder, value):
    path = folder / "val" / "masks" / "scene2.png"
    write_mask(path, 2)
    make_data(folder, "fit")
    write_mask(path, value)
    with fails_naming(path, f"value {value},"):
        make_data(folder, "fit")


def test_code_above_255(folder):
    path = folder / "val" / "masks" / "scene0.png"
    mask = np.array(Image.open(path)).astype(np.uint16)
    Image.fromarray(mask).save(path)
    make_data(folder, "fit")  # 16 bits as such are welcome
    mask[0, 0] = 257
    Image.fromarray(mask).save(path)
    with fails_naming(path, "value 257,"):
        make_data(folder, "fit")


def test_colour_mask(folder):
    path = folder / "train" / "masks" / "scene0.png"
    Image.open(path).convert("RGB").save(path)
    with fails_naming(path, "RGB", "map its colours to indices"):
        make_data(folder, "fit")


def damage_image(folder, ending):
    """Makes training scene 1 a truncated file of this kind; returns its path."""
    path = folder / "train" / "images" / "scene1.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    path.unlink()
    image.save(path.with_suffix(ending), quality=95)
    truncate(path.with_suffix(ending))
    return path.with_suffix(ending)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp"])
def test_truncated_image(folder, ending):
    path = damage_image(folder, ending)
    with fails_naming(path, "restore or remove"):
        make_data(folder, "fit")


def test_truncated_mask(folder):
    path = folder / "train" / "masks" / "scene1.png"
    truncate(path)
    with fails_naming(path, "restore or remove"):
        make_data(folder, "fit")


@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>"], ids=["empty", "html"])
def test_file_that_is_no_image(folder, part, content):
    path = folder / "val" / part / "scene2.png"
    path.write_bytes(content)
    with fails_naming(path, "restore or remove"):
        make_data(folder, "fit")


def read_all(loader):
    """Reads all batches, and ends the loader processes: garbage collection waits 10 s for them."""
    try:
        return list(loader)
    finally:
        if loader.num_workers:
            loader._iterator._shutdown_workers()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_file_that_breaks_during_training_is_named(folder, num_workers):
    data = make_data(folder, "fit", batch_size=3, num_workers=num_workers)
    path = folder / "train" / "images" / "scene1.png"
    truncate(path)
    with fails_naming(path, "restore or remove"):
        read_all(data.train_dataloader())


def test_worker_names_a_wrong_mask(small_camvid):
    data = CamVid(str(small_camvid), num_workers=1)
    data.setup("validate")
    path = small_camvid / "val" / "labels" / "frame1.png"
    write_mask(path, 99)
    with fails_naming(path, "value 99,"):
        read_all(data.val_dataloader())


def test_helpers_write_the_same_files_every_time(tmp_path):
    for make in (make_folder, make_camvid):
        first, second = make(tmp_path / make.__name__ / "1"), make(tmp_path / make.__name__ / "2")
        files = sorted(p.relative_to(first) for p in first.rglob("*.*"))
        assert len(files) >= 12
        assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)


def test_more_classes_than_a_mask_can_hold_are_refused():
    with fails_naming("at most 254 classes"):
        code_table(255, None, False)
    assert code_table(254, None, False)[253] == 253


def test_class_names_may_begin_with_a_byte_order_mark(folder):
    (folder / "classes.txt").write_text("sky\nroad\ncar\n", "utf-8-sig")
    assert SegmentationFolder(root=str(folder)).class_names == ["sky", "road", "car"]


# Masks in colours

COLOURS = {"road": (128, 64, 128), "car": (0, 0, 142), "tree": (107, 142, 35)}
WITH_COLOURS = "road 128 64 128\nignore 0,0,0\ncar,0,0,142\ntree 107, 142, 35\nignore, 1 1 1\n"


@pytest.fixture
def coloured(folder):
    """A folder whose masks are in colours: an RGB, an RGBA, a palette of its own, in each split."""
    (folder / "classes.txt").write_text(WITH_COLOURS)
    shown = np.zeros((256, 3), np.uint8)
    shown[:3] = list(COLOURS.values())
    for split in ("train", "val", "test"):
        for number, mode in enumerate(("RGB", "RGBA", "P")):
            path = folder / split / "masks" / f"scene{number}.png"
            mask = Image.fromarray(shown[np.array(Image.open(path))])
            if mode == "P":
                mask = mask.quantize(8)
                assert len(np.unique(mask)) == 4
            mask.convert(mode).save(path)
    return folder


def test_masks_are_read_by_their_colours(coloured, tmp_path):
    plain = make_data(make_folder(tmp_path / "plain"), "validate")
    expected = [batch["mask"] for batch in plain.val_dataloader()]
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        data = make_data(coloured, "validate", None, cache=cache, num_workers=1)
        assert data.class_names == list(COLOURS)
        assert list(data.palette) == list(COLOURS.values())
        masks = [batch["mask"] for batch in data.val_dataloader()]
        assert all(map(torch.equal, masks, expected))
    # Another order of classes must not find what was cached for this one.
    (coloured / "classes.txt").write_text("\n".join(reversed(WITH_COLOURS.splitlines())))
    data = make_data(coloured, "validate", None, cache=str(tmp_path / "cache"))
    masks = [batch["mask"] for batch in data.val_dataloader()]
    turned = torch.tensor([2, 1, 0, *[255] * 253], dtype=torch.uint8)
    assert all(torch.equal(a, turned[b.long()]) for a, b in zip(masks, expected, strict=True))


def test_a_greyscale_mask_among_coloured_ones_holds_classes(coloured):
    text = "\n".join(line for line in WITH_COLOURS.splitlines() if line != "ignore 0,0,0")
    (coloured / "classes.txt").write_text(text.replace("ignore, 1 1 1", "ignore 1 1 2"))
    for split in ("train", "val"):
        mask = make_scene(1, (24, 32), [0, 1, 2, 255])[1]
        for path in sorted((coloured / split / "masks").iterdir()):
            Image.fromarray(mask).save(path)
    assert np.array_equal(make_data(coloured, "validate", None)._datasets["val"][1]["mask"], mask)


def test_a_greyscale_mask_is_read_by_colour_where_a_class_is_grey(coloured):
    # As programs save a mask that happens to be all void.
    Image.new("L", (32, 24)).save(coloured / "val" / "masks" / "scene1.png")
    assert (make_data(coloured, "validate", None)._datasets["val"][1]["mask"] == 255).all()


def test_colours_are_not_overlooked_where_names_are_given(coloured):
    with fails_naming("classes.txt gives colours and names", "leave out --data.class_names"):
        make_data(coloured)


def test_a_colour_that_is_no_class_is_named(coloured):
    path = coloured / "val" / "masks" / "scene0.png"
    mask = np.array(Image.open(path))
    mask[5, 6] = 1, 2, 3
    Image.fromarray(mask).save(path)
    with fails_naming(path, "(1, 2, 3)", "classes.txt"):
        make_data(coloured, "validate", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("road 1 2 3\ncar\n", ("some lines end in a colour", "but not car")),
        ("road 1 2 3\ncar 1 2 3\n", ("on one line only", "(1, 2, 3)")),
        ("road 1 2 3\ncar 1 2 256\n", ("up to 255", "(1, 2, 256)")),
        ("road 1 2 3\nignore 1 2 4\n", ("at least two classes", "road")),
    ],
)
def test_wrong_colours_in_classes_txt(folder, text, words):
    (folder / "classes.txt").write_text(text)
    with fails_naming(*words):
        SegmentationFolder(root=str(folder))


@pytest.mark.parametrize("option", [{"label_map": {0: 1}}, {"reduce_zero_label": True}])
def test_colours_and_a_translation_do_not_go_together(folder, option):
    (folder / "classes.txt").write_text(WITH_COLOURS)
    with fails_naming("classes.txt", "leave out"):
        SegmentationFolder(root=str(folder), **option)


# Splits by lists of names


@pytest.fixture
def listed(tmp_path):
    """A folder of all images, one of them without a mask, and lists of names."""
    root = make_folder(tmp_path / "made", splits=("all",), count=5) / "all"
    (root / "masks" / "scene4.png").unlink()
    # As a Windows editor saves it.
    (root / "train.txt").write_bytes(b"\xef\xbb\xbfscene2\r\n\r\n  scene0.png\r\n")
    (root / "val.txt").write_text("scene3\n")
    return root


def test_lists_say_which_files_are_of_a_split(listed):
    data = make_data(listed, "fit")
    names = {split: [image.name for image, _ in data.list_pairs(split)] for split in data._datasets}
    assert names == {"train": ["scene2.png", "scene0.png"], "val": ["scene3.png"]}
    (sample,) = data.val_dataloader()
    assert np.array_equal(sample["mask"][0], make_scene(3, (24, 32), [0, 1, 2, 255])[1])


def test_a_listed_name_may_have_a_dot(listed):
    for part in ("images", "masks"):
        (listed / part / "scene3.png").rename(listed / part / "a.b c.png")
        (listed / part / "scene2.png").rename(listed / part / "a.png")
    for name in ("a.b c", "a.b c.png"):
        (listed / "val.txt").write_text(name)
        assert make_data(listed).list_pairs("val")[0][0].name == "a.b c.png"


def test_a_folder_of_the_split_comes_before_a_list(listed):
    make_folder(listed, splits=("val",), count=2)
    assert len(make_data(listed).list_pairs("val")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scene1\nscene7\n", ("1 of 2 names have no file in", "images", "scene7")),
        ("scene1\nscene4\n", ("1 of 2 names have no file in", "masks", "scene4")),
        ("scene1\nscene2\nscene1.png", ("more than once", "scene1")),
        ("scene1.v2\n", ("1 of 1 names have no file in", "images", "scene1.v2")),
        ("images/scene1.png masks/scene1.png\n", ("without folders", "images/scene1.png masks")),
        (" \n", ("lists nothing",)),
        (None, ("val split not found", "val/images", "nor", "val.txt")),
    ],
)
def test_wrong_lists(listed, text, words):
    path = listed / "val.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
        words = (path, *words)
    with fails_naming(*words):
        make_data(listed).list_pairs("val")


def test_a_listed_file_needs_a_mask_of_its_own(listed):
    (listed / "images" / "scene3.png").rename(listed / "images" / "scene1.v2.png")
    (listed / "val.txt").write_text("scene1.v2\n")
    with fails_naming("no file in", "masks", "scene1.v2"):  # and not that of scene1
        make_data(listed).list_pairs("val")


def test_a_list_of_another_encoding_is_told(listed):
    (listed / "val.txt").write_bytes("Straße".encode("latin-1"))
    with fails_naming(listed / "val.txt", "is no UTF-8 text"):
        make_data(listed).list_pairs("val")
