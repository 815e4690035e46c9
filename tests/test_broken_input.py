"""What comes of every broken input, from the command line to the message: one table.

How files are read and checked in detail is in test_files.py, test_datamodule.py and others.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import fails_naming, make_folder, make_scene, truncate
from PIL import ExifTags, Image

from isanet_pl.__main__ import run
from isanet_pl.cli import main
from isanet_pl.errors import InputError
from isanet_pl.explain import explain, less_memory
from isanet_pl.hardware import num_cores
from isanet_pl.models import ISANet

CONFIG = """
model:
  network:
    {backbone: resnet18, last_stage: 1, key_channels: 4, value_channels: 4, out_channels: 4}
  loss: {}
data:
  class_path: SegmentationFolder
  init_args: {class_names: [sky, road, car], batch_size: 2, crop_size: [32, 32], num_workers: 0}
trainer:
  max_steps: 2
  val_check_interval: 1
  check_val_every_n_epoch: null
  accelerator: cpu
  enable_progress_bar: false
panels: {num_images: 0}
"""
IMAGE, MASK = "data/train/images/scene0.png", "data/train/masks/scene0.png"
VAL_IMAGE, VAL_MASK = "data/val/images/scene0.png", "data/val/masks/scene0.png"
RESTORE = "restore or remove it"
NEW_NAME = "data/val/images/ä ö 場所 'x' [1].png"


@pytest.fixture(autouse=True)
def no_process_arguments(monkeypatch):
    # LightningCLI warns when a process has arguments of its own besides the given ones.
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])


@pytest.fixture
def place(tmp_path):
    """A folder with a config and data that train."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    make_folder(tmp_path / "data")
    return tmp_path


def arguments(place, command, options):
    given = {"config": place / "config.yaml", "data.root": place / "data"}
    given["runs_dir"] = place / "runs"
    first = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    return [command, *first, *(str(option).replace("PLACE", str(place)) for option in options)]


def complaint(capsys, given):
    """Returns what the command line says when it refuses its input."""
    with pytest.raises((InputError, SystemExit)) as refusal:
        main(given)
    if isinstance(refusal.value, InputError):
        return str(refusal.value)
    assert refusal.value.code == 2
    return capsys.readouterr().err


def check_refused(capsys, place, change, options, words, command="fit"):
    change(place)
    text = complaint(capsys, arguments(place, command, options))
    for word in words:
        assert word in text


def nothing(place):
    pass


# Data that is refused: (what is wrong, how it comes to be, what the message says)


def on(path, change, **options):
    """Returns a change of one file of the place."""
    return lambda place: change(place / path, **options)


def save(values, dtype=np.uint8):
    return lambda path: Image.fromarray(np.array(values, dtype=dtype)).save(path)


def rename(suffix):
    return lambda path: path.rename(path.with_suffix(suffix))


def put_value(path, value=77):
    mask = np.array(Image.open(path))
    mask[5, 6] = value
    Image.fromarray(mask).save(path)


def link_to(target):
    def change(path):
        path.unlink()
        path.symlink_to(target)

    return change


def copy_as(suffix):
    return lambda path: shutil.copy(path, path.with_suffix(suffix))


def shrink(path):
    Image.open(path).resize((16, 12), Image.Resampling.NEAREST).save(path)


def huge(path):
    Image.new("1", (15_000, 12_000)).save(path)


def no_image(path):
    path.write_text("<html>404 not found</html>")


def empty(path):
    path.write_bytes(b"")


DATA = [
    ("truncated image", on(IMAGE, truncate), (IMAGE, RESTORE)),
    ("truncated mask", on(MASK, truncate), (MASK, RESTORE)),
    ("truncated image of val", on(VAL_IMAGE, truncate), (VAL_IMAGE, RESTORE)),
    ("image of zero bytes", on(IMAGE, empty), (IMAGE, "the file is empty", RESTORE)),
    ("mask of zero bytes", on(MASK, empty), (MASK, "the file is empty", RESTORE)),
    ("web page as image", on(IMAGE, no_image), (IMAGE, "it is no image", RESTORE)),
    ("huge image", on(IMAGE, huge), (IMAGE, "more than 178956970 pixels; cut it into tiles")),
    ("image of unknown ending", on(IMAGE, rename(".dat")), (MASK, "no image of the same name")),
    ("mask of an image's ending", on(MASK, rename(".jpg")), (IMAGE, "no mask of the same name")),
    ("image without mask", on(MASK, Path.unlink), (IMAGE, "no mask of the same name")),
    ("mask without image", on(IMAGE, Path.unlink), (MASK, "no image of the same name")),
    ("two images for a mask", on(IMAGE, copy_as(".bmp")), (IMAGE, "scene0.bmp", "remove one")),
    ("link to nowhere", on(IMAGE, link_to("gone.png")), (IMAGE, "file not found")),
    ("link to itself", on(MASK, link_to("scene0.png")), (MASK, "Too many levels", RESTORE)),
    ("label out of range", on(MASK, put_value), (MASK, "value 77", "3 classes", "label_map")),
    ("label above 255", on(MASK, save([[0, 300]], np.uint16)), (MASK, "value 300", "label_map")),
    (
        "colours for labels",
        on(MASK, save(np.zeros((24, 32, 3)))),
        (MASK, "RGB", "map its colours to indices first"),
    ),
    ("mask of another size", on(MASK, shrink), (IMAGE, "32x24", MASK, "16x12", "one size")),
    ("no val", on("data/val", shutil.rmtree), ("val split not found", "data/val/images")),
    (
        "no image at all",
        lambda place: [path.unlink() for path in (place / IMAGE).parent.iterdir()],
        ("no file in", "data/train/images", ".png"),
    ),
]


@pytest.mark.parametrize(("change", "words"), [d[1:] for d in DATA], ids=[d[0] for d in DATA])
def test_broken_data_is_named_with_the_fix(place, capsys, change, words):
    check_refused(capsys, place, change, (), words)
    assert not [path for path in (place / "runs").rglob("*") if path.is_file()]


def forbid(patch, path):
    """Makes a file unreadable, also for root, whom no mode of a file stops."""
    opened = Image.open

    def refuse(file, *rest, **options):
        if Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *rest, **options)

    patch.setattr(Image, "open", refuse)


def test_file_without_permission_is_named(place, capsys, monkeypatch):
    forbid(monkeypatch, place / IMAGE)
    check_refused(capsys, place, nothing, (), (IMAGE, "Permission denied"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission_is_named(place, capsys):
    folder = (place / IMAGE).parent
    folder.chmod(0)
    check_refused(capsys, place, nothing, (), ("data/train/images", "Permission denied"))
    folder.chmod(0o755)


class Vandal(pl.Callback):
    """Does something to the files of a run after its first step."""

    def __init__(self, path: str, how: str) -> None:
        self.path = Path(path)
        self.how = how

    def on_train_batch_end(self, *_):
        for file in self.path.iterdir() if self.path.is_dir() else [self.path]:
            truncate(file) if self.how == "truncate" else file.unlink(missing_ok=True)


def vandal(path, how):
    given = {"class_path": "test_broken_input.Vandal"}
    given["init_args"] = {"path": f"PLACE/{path}", "how": how}
    return "--trainer.callbacks+", str(given)


def test_files_removed_during_training_are_named(place, capsys):
    options = vandal("data/train/images", "remove")
    check_refused(capsys, place, nothing, options, ("file not found", "data/train/images/scene"))


def test_image_broken_during_training_is_named_by_a_loader_process(place, capsys):
    options = (*vandal("data/train/images", "truncate"), "--data.num_workers", 1)
    options += ("--trainer.max_steps", 20, "--trainer.val_check_interval", 20)
    check_refused(capsys, place, nothing, options, ("data/train/images/scene", RESTORE))


# Data that is handled: every val image below shows the scene, whatever its file is like


def rewritten(change, suffix=".png", **options):
    def rewrite(place):
        path = place / VAL_IMAGE
        image = change(Image.open(path))
        path.unlink()
        image.save(path.with_suffix(suffix), **options)

    return rewrite


def turn(place):
    path, exif = place / VAL_IMAGE, Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees to the right
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def wide(image):
    return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)


def name_oddly(place):
    for path in (place / VAL_IMAGE, place / VAL_MASK):
        path.rename(path.with_name(Path(NEW_NAME).name))


def jpeg_named_png(place):
    Image.open(place / VAL_IMAGE).save(place / VAL_IMAGE, "jpeg", quality=100)


def clutter(place):
    folder = (place / VAL_IMAGE).parent
    (folder / "again").symlink_to("..")  # a loop of folders
    (folder / "Thumbs.db").write_bytes(b"\0")
    (folder / "more.png").mkdir()


def link_elsewhere(place):
    path = place / VAL_IMAGE
    path.rename(place / "elsewhere.png")
    path.symlink_to(place / "elsewhere.png")


HANDLED = [
    ("CMYK", rewritten(lambda image: image.convert("CMYK"), ".jpg", quality=100), 20),
    ("16 bits", rewritten(wide), 20),  # of the three colours, which differ by less
    ("transparent", rewritten(lambda image: image.convert("RGBA")), 0),
    ("palette", rewritten(lambda image: image.quantize(256)), 12),
    ("EXIF orientation", turn, 0),
    ("JPEG by the name of a PNG", jpeg_named_png, 20),
    ("odd letters in the name", name_oddly, 0),
    ("a loop of folders and other files", clutter, 0),
    ("a link to a file", link_elsewhere, 0),
]


@pytest.mark.parametrize(
    ("change", "tolerance"), [h[1:] for h in HANDLED], ids=[h[0] for h in HANDLED]
)
def test_unusual_images_are_seen_as_they_are_shown(place, change, tolerance):
    change(place)
    # Without training, which sees what the data set hands out.
    data = main(arguments(place, "fit", ())[1:], run=False).datamodule
    data.setup("fit")
    samples = [data._datasets["val"][index] for index in range(3)]
    named = [s for s in samples if not s["name"].endswith(("scene1.png", "scene2.png"))]
    assert len(named) == 1
    expected, mask = make_scene(0, (24, 32), (0, 1, 2, 255))
    seen = named[0]["image"].permute(1, 2, 0).numpy().astype(int)
    assert abs(seen - expected).max() <= tolerance
    assert np.array_equal(named[0]["mask"].numpy(), mask)


def masks_of(place, split, change):
    for path in (place / "data" / split / "masks").iterdir():
        mask = np.array(Image.open(path))
        change(mask)
        Image.fromarray(mask).save(path)


def all_ignored(mask):
    mask[:] = 255


def without_car(mask):
    mask[mask == 2] = 255


def test_images_of_one_pixel_train(place):
    shutil.rmtree(place / "data")
    make_folder(place / "data", size=(1, 1))
    assert main(arguments(place, "fit", ())).trainer.global_step == 2


def test_training_images_without_any_label_change_nothing_but_statistics(place):
    masks_of(place, "train", all_ignored)
    cli = main(arguments(place, "fit", ("--model.optimizer.weight_decay", 0)))
    assert cli.trainer.callback_metrics["train/loss"] == 0
    assert cli.trainer.callback_metrics["train/grad_norm"] == 0


def test_a_val_split_without_any_label_has_no_score(place, caplog):
    masks_of(place, "val", all_ignored)
    cli = main(arguments(place, "fit", ()))
    assert cli.trainer.callback_metrics["val/miou"].isnan()
    assert "no pixel of the val split has a label" in caplog.text


def test_a_stack_trace_on_request(place, monkeypatch, capsys):
    given = arguments(place, "fit", ["--data.root", "nowhere"])
    monkeypatch.setattr(sys, "argv", ["isanet-pl", *given])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "isanet-pl: error: " in capsys.readouterr().err
    monkeypatch.setenv("ISANET_DEBUG", "1")
    with pytest.raises(InputError, match="nowhere"):
        run()


def test_an_image_that_is_pooled_to_one_value_is_refused_with_the_fix(place, capsys):
    options = ("--model.network.context", "ppm", "--data.batch_size", "1")
    check_refused(capsys, place, nothing, options, ["BatchNorm", "--data.batch_size 2"])


def test_ignoring_another_label_than_the_data_is_refused(place):
    with fails_naming("model.loss.ignore_index is 0", "255"):
        main(arguments(place, "fit", ("--model.loss.ignore_index", 0)))


def test_a_class_that_never_occurs_is_absent_not_zero(place, capsys):
    for split in ("train", "val"):
        masks_of(place, split, without_car)
    bias = ISANet.forward

    def never_car(self, x):
        outputs = bias(self, x)
        never = torch.tensor([0.0, 0.0, 1e4], device=x.device)  # of no memory, for the cost
        outputs["out"] = outputs["out"] - never[:, None, None]
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ISANet, "forward", never_car)
        scores = main(arguments(place, "fit", ())).trainer.callback_metrics
    assert scores["val/iou/car"].isnan()
    others = (scores["val/iou/sky"] + scores["val/iou/road"]) / 2
    assert scores["val/miou"] == pytest.approx(float(others))
    assert "absent" in capsys.readouterr().out


# A file that breaks in a long run: skip


def break_images(count, of=150):
    def change(place):
        shutil.rmtree(place / "data" / "train")
        make_folder(place / "data", splits=("train",), count=of)
        for index in range(count):
            truncate(place / f"data/train/images/scene{index * of // count}.png")

    return change


ONE_PASS = ("--trainer.max_steps", 75, "--trainer.val_check_interval", 75)
SKIP = ("--data.on_error", "skip")


def test_a_broken_image_is_skipped_and_named_once(place, caplog):
    break_images(1)(place)
    two_passes = ("--trainer.max_steps", 150, "--trainer.val_check_interval", 150)
    with caplog.at_level("WARNING", logger="isanet_pl"):
        cli = main(arguments(place, "fit", (*SKIP, *two_passes)))
    assert cli.trainer.global_step == 150
    assert [str(place / IMAGE) in r.getMessage() for r in caplog.records].count(True) == 1


def test_more_than_one_percent_of_broken_images_end_the_run(place, capsys):
    words = ("2 of the 150 training samples", "more than 1%", "data/train/images/scene", RESTORE)
    check_refused(capsys, place, break_images(2), (*SKIP, *ONE_PASS), words)


def test_nothing_but_broken_images_end_the_run_at_once(place, capsys):
    words = ("data/train/images/scene", RESTORE)
    check_refused(capsys, place, break_images(3, of=3), SKIP, words)


def test_a_broken_image_of_val_ends_the_run_also_where_others_are_skipped(place, capsys):
    check_refused(capsys, place, on(VAL_IMAGE, truncate), SKIP, (VAL_IMAGE, RESTORE))
    assert not [path for path in (place / "runs").rglob("*") if path.is_file()]  # at the start


# Configs


def write(name, text):
    return lambda place: (place / name).write_text(text)


CONFIGS = [
    ("unknown key", write("o.yaml", "data: {crop: 3}"), ("--config", "PLACE/o.yaml"), ("crop",)),
    ("broken YAML", write("o.yaml", "model: ["), ("--config", "PLACE/o.yaml"), ("parsing",)),
    ("a list", write("o.yaml", "- 1"), ("--config", "PLACE/o.yaml"), ("Unexpected config",)),
    ("no such file", nothing, ("--config", "PLACE/no.yaml"), ("does not exist", "no.yaml")),
    ("unknown option", nothing, ("--data.rooot", "x"), ("rooot",)),
    ("unknown data set", nothing, ("--data", "Camvid"), ("Camvid",)),
    ("unknown form", nothing, ("--model.network.form", "wide"), ("form", "wide")),
    ("a word for a number", nothing, ("--data.crop_size", "big"), ("crop_size", "big")),
    ("three sides", nothing, ("--data.crop_size", "[8, 8, 8]"), ("crop_size",)),
    ("negative crop", nothing, ("--data.crop_size", "[-4, 8]"), ("crop_size", "(-4, 8)")),
    ("scales reversed", nothing, ("--data.scale_range", "[2, 1]"), ("0 < low <= high", "(2.0, 1")),
    ("batch of zero", nothing, ("--data.batch_size", 0), ("batch sizes must be at least 1: 0",)),
    ("negative workers", nothing, ("--data.num_workers", -1), ("num_workers", "-1")),
    ("too large a batch", nothing, ("--data.batch_size", 4), ("3 images", "--data.batch_size 3")),
    ("K = 1", nothing, ("--data.class_names", "[sky]"), ("at least two classes", "sky")),
    ("class twice", nothing, ("--data.class_names", "[a, b, a]"), ("occurs twice", "a")),
    ("window of zero", nothing, ("--model.network.down_factors", "[[0, 8]]"), (">= 1", "(0, 8)")),
    ("no channels", nothing, ("--model.network.key_channels", 0), ("key_channels", "got 0")),
    ("dropout of 2", nothing, ("--model.network.dropout", 2), ("between 0 and 1", "2")),
    ("negative rate", nothing, ("--model.optimizer.lr", -1), ("model.optimizer", "-1")),
    ("negative length", nothing, ("--trainer.max_steps", -5), ("max_steps", "-5")),
    ("no length", nothing, ("--trainer.max_steps", -1), ("set trainer.max_steps or max_epochs",)),
    (
        "validation every 0 batches",
        nothing,
        ("--trainer.val_check_interval", 0),
        ("val_check_interval must be above 0",),
    ),
    (
        "validation beyond the end of an epoch",
        nothing,
        ("--trainer.val_check_interval", 9, "--trainer.check_val_every_n_epoch", 1),
        ("`val_check_interval` (9)", "number of the training batches (1)"),
    ),
    (
        "accumulation of 0",
        nothing,
        ("--trainer.accumulate_grad_batches", 0),
        ("accumulate_grad_batches must be above 0",),
    ),
    ("unknown score", nothing, ("--checkpoint.monitor", "val/iou"), ("val/iou", "val/miou")),
    ("progress never", nothing, ("--progress.every_n_steps", 0), ("progress.every_n_steps", "0")),
    (
        "windows of no size",
        nothing,
        ("--model.inference.mode", "slide"),
        ("inference.crop_size", "such as"),
    ),
]


@pytest.mark.parametrize(
    ("change", "options", "words"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS]
)
def test_a_wrong_config_is_refused(place, capsys, change, options, words):
    check_refused(capsys, place, change, options, words)


def test_an_overlay_before_the_data_set_that_it_is_for_is_refused(place, capsys):
    (place / "overlay.yaml").write_text("data: {init_args: {class_names: [a, b]}}")
    given = arguments(place, "fit", ())
    at = given.index("--config")
    text = complaint(capsys, [*given[:at], "--config", str(place / "overlay.yaml"), *given[at:]])
    assert "'class_names' is not accepted" in text
    cli = main([*given, "--config", str(place / "overlay.yaml"), "--data.class_names+", "c"])
    assert cli.datamodule.class_names == ["a", "b", "c"]


def test_a_crop_smaller_than_the_window_is_padded(place):
    options = ("--data.crop_size", "[16, 16]", "--model.network.down_factors", "[[16, 16]]")
    assert main(arguments(place, "fit", options)).trainer.global_step == 2


# Checkpoints


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """Returns the last checkpoint of a finished fit."""
    place = tmp_path_factory.mktemp("trained")
    (place / "config.yaml").write_text(CONFIG)
    make_folder(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isanet-pl"])
        main(arguments(place, "fit", ()))
    return place / "runs" / "config" / "version_0" / "checkpoints" / "last.ckpt"


def content(change):
    """Returns a change of what is in a checkpoint."""

    def rewrite(path):
        saved = torch.load(path, weights_only=True)
        torch.save(change(saved) or saved, path)

    return rewrite


def blank(path):
    """Overwrites a part of the weights, which leaves the archive around them as it was."""
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 5000] = bytes(5000)
    path.write_bytes(whole)


def other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")


def with_new_option(saved):
    saved["hyper_parameters"]["network"]["gizmo"] = 3


def without_bias(saved):
    del saved["state_dict"]["network.classifier.bias"]


def with_nan(saved):
    saved["state_dict"]["network.classifier.weight"][0] = torch.nan


def leave(path):
    pass


NETWORK = "the checkpoint holds another network than the config describes"
CHECKPOINTS = [
    ("truncated", "fit", truncate, (), ("last.ckpt is not a checkpoint, or is truncated",)),
    ("zero bytes", "fit", empty, (), ("last.ckpt is not a checkpoint, or is truncated",)),
    ("bytes lost", "validate", blank, (), ("last.ckpt is damaged", "copy it anew")),
    ("another archive", "validate", other_archive, (), ("last.ckpt is damaged",)),
    ("a list", "validate", content(lambda _: [1, 2]), (), ("last.ckpt", "no checkpoint")),
    (
        "weights alone",
        "validate",
        content(lambda saved: saved["state_dict"]),
        (),
        ("last.ckpt", "no checkpoint", "scripts/convert_checkpoint.py"),
    ),
    (
        "a tensor missing",
        "validate",
        content(without_bias),
        (),
        ("1 of its", "network.classifier.bias"),
    ),
    (
        "NaN in the weights",
        "validate",
        content(with_nan),
        (),
        ("network.classifier.weight is not finite",),
    ),
    (
        "of a newer version",
        "validate",
        content(with_new_option),
        (),
        (NETWORK, "network.gizmo: checkpoint 3", "no such option"),
    ),
    (
        "other channels",
        "validate",
        leave,
        ("--model.network.key_channels", 8),
        (NETWORK, "network.key_channels: checkpoint 4, config 8"),
    ),
    (
        "other windows, same shapes",
        "validate",
        leave,
        ("--model.network.down_factors", "[[4, 4]]"),
        (NETWORK, "network.down_factors: checkpoint [(8, 8)], config [(4, 4)]"),
    ),
    (
        "another K",
        "validate",
        leave,
        ("--data.class_names", "[sky, road, car, tree]"),
        ("trained for 3 classes (sky, road, car), but the data has 4",),
    ),
    (
        "nothing to go on training with",
        "fit",
        content(lambda saved: saved.pop("optimizer_states") and None),
        (),
        ("last.ckpt", "weights alone"),
    ),
    (
        "another optimiser",
        "fit",
        leave,
        ("--model.optimizer", "AdamW", "--trainer.max_steps", 4),
        ("model.optimizer: checkpoint torch.optim.SGD, config torch.optim.AdamW",),
    ),
    ("a folder", "validate", lambda path: path.unlink() or path.mkdir(), (), ("not found",)),
]


@pytest.mark.parametrize(
    ("command", "change", "options", "words"),
    [c[1:] for c in CHECKPOINTS],
    ids=[c[0] for c in CHECKPOINTS],
)
def test_a_broken_or_other_checkpoint_is_refused(
    place, last, capsys, command, change, options, words
):
    shutil.copy(last, place / "last.ckpt")
    change(place / "last.ckpt")
    options = ("--ckpt_path", "PLACE/last.ckpt", *options)
    check_refused(capsys, place, nothing, options, words, command)


def test_a_checkpoint_of_a_newer_version_is_refused_without_a_config_too(place, last, capsys):
    shutil.copy(last, place / "last.ckpt")
    content(with_new_option)(place / "last.ckpt")
    given = ["validate", "--ckpt_path", str(place / "last.ckpt"), "--data", "SegmentationFolder"]
    text = complaint(capsys, [*given, "--data.root", str(place / "data")])
    assert "gizmo" in text


# The machine


ENVIRONMENT = [
    ("runs below a file", ("--runs_dir", "PLACE/config.yaml"), ("config.yaml", "Not a directory")),
    ("runs where nobody may write", ("--runs_dir", "/sys/runs"), ("/sys/runs", "another --runs_")),
    ("cache where nobody may write", ("--data.cache", "/sys/cache"), ("/sys/cache", "name a fol")),
    (
        "a crop of more pixels than memory",
        ("--data.crop_size", "[100000000, 100000000]"),
        ("out of memory", "--data.crop_size '[75000000, 75000000]'", "--trainer.precision bf16"),
    ),
    (
        "a clock for each of two processes",
        ("--trainer.devices", "2", "--trainer.val_check_interval", "00:00:15:00"),
        ("trainer.val_check_interval", "give a number of steps"),
    ),
]


@pytest.mark.parametrize(
    ("options", "words"), [e[1:] for e in ENVIRONMENT], ids=[e[0] for e in ENVIRONMENT]
)
def test_what_the_machine_refuses_is_said(place, capsys, options, words):
    check_refused(capsys, place, nothing, options, words)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_missed(place, capsys, name):
    words = (f"--trainer.accelerator {name}", "finds no GPU here; take cpu or auto")
    check_refused(capsys, place, nothing, ("--trainer.accelerator", name), words)


@contextlib.contextmanager
def full_disk(most):
    """Lets no file grow beyond a number of bytes, which the system reports as it does a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("most", "words"),
    [(100, ("cannot write", "--resume true")), (50_000, ("checkpoint", ".ckpt", "Make room"))],
)
def test_a_full_disk_is_said(place, capsys, most, words):
    with full_disk(most):
        check_refused(capsys, place, nothing, (), ("File too large", *words))


def fail(error):
    def forward(*_):
        raise error

    return forward


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_proposes_what_takes_less(place, capsys, monkeypatch, error):
    monkeypatch.setattr(ISANet, "forward", fail(error))
    make_folder(place / "more", count=4)
    options = ("--data.root", "PLACE/more", "--data.batch_size", 4, "--data.eval_batch_size", 2)
    options += ("--model.network.context", "dense", "--trainer.accumulate_grad_batches", 3)
    words = (
        "out of memory",
        "--data.batch_size 2 --trainer.accumulate_grad_batches 6 (now 4 and 3)",
        "--data.crop_size '[24, 24]' (now [32, 32])",
        "--trainer.precision bf16-mixed",
        "--model.network.context isa (now dense; train anew)",
        "--model.inference.mode slide",
        "--data.eval_batch_size 1 (now 2)",
    )
    check_refused(capsys, place, nothing, options, words)


def test_out_of_memory_in_evaluation_proposes_nothing_for_training(
    place, last, capsys, monkeypatch
):
    monkeypatch.setattr("isanet_pl.inference.Inference.__call__", fail(OUT_OF_MEMORY[0]))
    text = complaint(capsys, arguments(place, "validate", ("--ckpt_path", last)))
    assert "--model.inference.mode slide" in text
    assert "accumulate" not in text
    assert "crop_size '[24" not in text


@pytest.mark.parametrize(
    ("command", "proposed"),
    [
        ("export", ["--size '[256, 512]' (now [512, 1024])", "--num_calibration 32 (now 64)"]),
        ("predict", ["--model.inference.mode slide", "--data.num_workers 1"]),
    ],
)
def test_out_of_memory_proposes_what_the_command_has(command, proposed):
    config = Namespace(
        data=Namespace(init_args=Namespace(eval_batch_size=4, num_workers=None)),
        model=Namespace(network=Namespace(context="isa"), inference=Namespace(mode="whole")),
        size=(512, 1024), images="photos", num_calibration=64,
    )  # fmt: skip
    lines = less_memory(command, config).splitlines()[1:]
    assert len(lines) == len(proposed)
    for line, words in zip(lines, proposed, strict=True):
        assert words in line


def test_out_of_memory_proposes_no_loader_process_to_who_has_none():
    config = Namespace(
        data=Namespace(init_args=Namespace(eval_batch_size=1, num_workers=0)),
        model=Namespace(network=Namespace(context="isa"), inference=Namespace(mode="slide")),
    )
    assert less_memory("predict", config) == (
        "it takes a machine with more memory, or a smaller network"
    )


def test_another_runtime_error_keeps_its_stack_trace(place, monkeypatch):
    monkeypatch.setattr(ISANet, "forward", fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(arguments(place, "fit", ()))


def test_wandb_that_cannot_be_reached_is_said(place, capsys, monkeypatch):
    import wandb

    def fail_to_connect(**_):
        raise wandb.errors.CommError("connection refused")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", fail_to_connect)
    words = ("W&B: connection refused", "use --wandb offline", "wandb sync")
    check_refused(capsys, place, nothing, ("--wandb", "auto"), words)


class Killer(pl.Callback):
    """Kills a loader process, as Linux does when memory runs out."""

    def on_train_batch_end(self, trainer, *_):
        trainer.train_dataloader._iterator._workers[0].kill()


def test_a_killed_loader_process_is_said_to_be_memory(place, capsys):
    options = ("--trainer.callbacks+", "test_broken_input.Killer", "--data.num_workers", 1)
    options += ("--trainer.max_steps", 50, "--trainer.val_check_interval", 50)
    words = ("a loader process has died, most likely out of memory", "num_workers 0 (now 1;")
    check_refused(capsys, place, nothing, options, words)


def test_more_workers_than_cores_and_images_work(place):
    options = ("--data.num_workers", num_cores() + 1, "--trainer.max_steps", 1)
    with pytest.warns(UserWarning, match="worker processes"):
        assert main(arguments(place, "fit", options)).trainer.global_step == 1


# As users see it


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (on(IMAGE, truncate), ("--data.num_workers", 1), (IMAGE, RESTORE)),
        (break_images(2), (*SKIP, *ONE_PASS, "--data.num_workers", 1), ("more than 1%", RESTORE)),
        (nothing, ("--data.crop_size", "[100000000, 100000000]"), ("out of memory",)),
        (nothing, ("--trainer.val_check_interval", 0), ("must be above 0",)),
    ],
    ids=["truncated image", "too many skipped", "out of memory", "option of Lightning"],
)
def test_the_program_ends_with_one_message_and_exit_code_2(
    place, change, options, words, monkeypatch, capsys
):
    change(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["isanet-pl", *arguments(place, "fit", options)])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    _, message = error.split("isanet-pl: error: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(("error", "code"), [(InputError("a file"), 2), (KeyError("a bug"), 1)])
def test_one_of_several_processes_ends_at_once(error, code, monkeypatch, capsys):
    """Python's exit would wait for the others, where they are on GPUs."""

    def leave(code):
        raise SystemExit(f"left with {code}")

    def fail_to_run():
        raise error

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("isanet_pl.__main__.main", fail_to_run)
    with pytest.raises(SystemExit, match=f"left with {code}"):
        run()
    said = capsys.readouterr().err
    assert str(error) in said
    assert ("Traceback" in said) == (code == 1)


def test_each_of_two_processes_ends_with_one_message_and_exit_code_2(place):
    break_images(2)(place)
    given = arguments(place, "fit", (*SKIP, *ONE_PASS, "--trainer.devices", 2))
    done = subprocess.run(
        [sys.executable, "-m", "isanet_pl", *given], capture_output=True, text=True, cwd=place
    )
    assert "Traceback" not in done.stderr
    _, *messages = done.stderr.split("isanet-pl: error: ")
    if done.returncode == -signal.SIGKILL:  # by Lightning, which found the other one gone before
        assert messages
        return
    assert done.returncode == 2
    assert len(messages) == 2
    for word in ("more than 1%", RESTORE):
        assert any(word in message for message in messages)


@pytest.mark.parametrize(
    ("said", "option"),
    [
        (
            "The current optimizer, AdamW, does not allow for gradient clipping because it "
            "performs unscaling of gradients internally.",
            "--trainer.gradient_clip_val does not go together",
        ),
        (
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but "
            "you set 'torch.use_deterministic_algorithms(True)'.",
            "--trainer.deterministic true",
        ),
    ],
)
def test_options_that_only_a_gpu_refuses_are_named(said, option):
    told = explain(RuntimeError(said))
    assert told is not None
    assert option in str(told)
    assert said in str(told)
