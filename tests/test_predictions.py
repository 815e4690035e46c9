"""`predict` as users run it: formats, broken files, going on, a checkpoint alone."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails_naming, make_scene
from PIL import Image

from isanet_pl.callbacks.predictions import PredictionWriter
from isanet_pl.callbacks.progress import Progress
from isanet_pl.checkpoints import with_config_of_checkpoint
from isanet_pl.cli import main
from isanet_pl.data import ADE20K, Cityscapes, SegmentationFolder, dataset
from isanet_pl.errors import InputError
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet

NAMES = ("sky", "road", "car")
QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
PALETTE = ((70, 130, 180), (128, 64, 128), (0, 0, 142))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))  # runs are written there


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with all that `fit` keeps, of a network that was never trained."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.ckpt")


def write_checkpoint(path, names=NAMES, inference=None, seed=0, **arguments):
    torch.manual_seed(seed)
    network = ISANet(
        len(names), "resnet18", last_stage=1, key_channels=4, value_channels=4, out_channels=4,
        down_factors=((4, 4),), **{"form": "reduced", **arguments},
    )  # fmt: skip
    with torch.no_grad():  # so that several classes are found
        weight = torch.randn_like(network.classifier.weight)
        network.classifier.weight.copy_(weight - weight.mean(dim=(0, 1), keepdim=True))
        network.train()
        for _ in range(20):
            network(torch.randn(2, 3, 32, 32))
        scores = network.eval()(torch.randn(4, 3, 32, 32))["out"]
        network.classifier.bias.sub_(scores.mean(dim=(0, 2, 3)))
    palette = [list(PALETTE[i % 3]) for i in range(len(names))]
    settings = {"base_size": None, "mirrored_classes": [], **(inference or {})}
    content = {
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        "hyper_parameters": {
            "network": network.arguments,
            "class_names": list(names),
            "palette": palette,
            "inference": settings,
        },
        "global_step": 7,
        "epoch": 0,
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save(content, path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Images of several formats, sizes and depths, with names that need care."""
    folder = tmp_path / "photos"
    (folder / "sub dir").mkdir(parents=True)
    for i, (name, size) in enumerate(
        (("a.png", (24, 32)), ("b.jpg", (40, 31)), ("sub dir/ü.webp", (17, 19)), ("c.tif", (1, 1)))
    ):
        Image.fromarray(make_scene(i, size, [0, 1, 2])[0]).save(folder / name)
    return folder


def predict(checkpoint, photos, out, *args):
    fixed = ("--trainer.accelerator", "cpu", "--data.num_workers", "0")
    where = ("--data.predict_dir", str(photos), "--output", str(out))
    return main(["predict", "--ckpt_path", str(checkpoint), *where, *fixed, *map(str, args)])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def plain(settings):
    """Returns settings with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


# What is written


def test_a_prediction_that_is_told_to_end_goes_on_later(checkpoint, photos, tmp_path, monkeypatch):
    save = PredictionWriter._save

    def told_to_end_after_the_first_mask(self, name, content):
        save(self, name, content)
        if name.startswith("masks/"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PredictionWriter, "_save", told_to_end_after_the_first_mask)
    with pytest.raises(SystemExit) as stop:
        predict(checkpoint, photos, tmp_path / "out")
    assert stop.value.code == 128 + signal.SIGTERM
    assert files(tmp_path / "out" / "masks") == ["a.png"]
    monkeypatch.setattr(PredictionWriter, "_save", save)
    predict(checkpoint, photos, tmp_path / "out")
    assert len(files(tmp_path / "out" / "masks")) == 4


def test_a_checkpoint_alone_segments_a_folder(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict(checkpoint, photos, tmp_path / "out")
    names = ["a", "b", "c", "sub dir/ü"]
    assert files(tmp_path / "out") == sorted(
        ["model.json", "shares.json"]
        + [f"masks/{name}.png" for name in names]
        + [f"overlays/{name}.png" for name in names]
    )
    network = ISANet.from_checkpoint(checkpoint)
    found = set()
    for name, ending in zip(names, ("png", "jpg", "tif", "webp"), strict=True):
        with Image.open(photos / f"{name}.{ending}") as image:
            expected = network.predict(image).numpy()
            mask = Image.open(tmp_path / "out" / "masks" / f"{name}.png")
            assert mask.size == image.size
            assert np.array_equal(np.array(mask), expected)
            assert mask.getpalette()[:9] == [part for colour in PALETTE for part in colour]
        found |= set(np.unique(expected).tolist())
    assert len(found) > 1
    # The default place of the checkpoint's own run is named after it.
    assert not (tmp_path / "runs" / "unnamed").exists()


def test_shares_tell_how_much_of_an_image_each_class_takes(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "out")
    shares = json.loads((tmp_path / "out" / "shares.json").read_text("utf-8"))
    assert sorted(shares) == ["a", "b", "c", "sub dir/ü"]
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "b.png"))
    expected = {NAMES[i]: np.mean(mask == i) for i in np.unique(mask)}
    assert shares["b"] == pytest.approx(expected, abs=1e-6)


def test_probabilities_on_request(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "out", "--predictions.probabilities", "true")
    values = np.load(tmp_path / "out" / "probabilities" / "sub dir" / "ü.npz")["probabilities"]
    assert values.dtype == np.float16
    assert values.shape == (3, 17, 19)
    assert np.allclose(values.astype(float).sum(0), 1, atol=2e-3)
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "sub dir" / "ü.png"))
    sure = np.sort(values, axis=0)[-1] - np.sort(values, axis=0)[-2] > 0.01
    assert np.array_equal(values.argmax(0)[sure], mask[sure])


def test_inference_settings_travel_with_the_checkpoint_and_can_be_changed(photos, tmp_path, caplog):
    caplog.set_level("INFO", "isanet_pl")
    settings = {"mode": "slide", "crop_size": [8, 8], "flip": True, "base_size": [40, 20]}
    path = write_checkpoint(tmp_path / "slide.ckpt", inference=settings)
    cli = predict(path, photos, tmp_path / "out")
    assert plain(cli.model.inference) == plain(
        Inference(mode="slide", crop_size=(8, 8), flip=True, base_size=(40, 20))
    )
    with Image.open(photos / "b.jpg") as image:
        found = ISANet.from_checkpoint(path).predict(image)
    written = np.array(Image.open(tmp_path / "out" / "masks" / "b.png"))
    assert np.array_equal(found, written)  # Python sees the image the same way
    cli = predict(path, photos, tmp_path / "whole", "--model.inference.mode", "whole")
    assert cli.model.inference.mode == "whole"
    assert cli.model.inference.flip is True
    assert tuple(cli.model.inference.base_size) == (40, 20)
    other = np.array(Image.open(tmp_path / "whole" / "masks" / "b.png"))
    assert not np.array_equal(other, written)
    said = "otherwise than by the checkpoint's own settings:\n  model.inference.mode: checkpoint"
    assert [said in record.getMessage() for record in caplog.records].count(True) == 1  # not before


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Cityscapes(), [7, 8, 11]),
        (Cityscapes(labels="labelTrainIds"), [7, 8, 11]),  # the server knows no others
        (ADE20K(), [1, 2, 3]),
        (SegmentationFolder(class_names=["a", "b"]), [0, 1]),
        (
            SegmentationFolder(
                class_names=["a", "b"], label_map={3: 0, 9: 1, 4: 0, 5: 255},
                reduce_zero_label=True,
            ),
            [4, 10],
        ),
    ],
)  # fmt: skip
def test_mask_codes_are_those_of_the_files(data, expected):
    assert data.mask_codes()[: len(expected)] == expected
    assert len(data.mask_codes()) == data.num_classes


def test_a_class_without_a_code_is_named():
    data = SegmentationFolder(class_names=["a", "b"], label_map={3: 0})
    with pytest.raises(InputError, match="no code for the classes b"):
        data.mask_codes()


@pytest.mark.parametrize("data", [Cityscapes(), ADE20K()])
def test_server_format(photos, tmp_path, data):
    path = write_checkpoint(tmp_path / "server.ckpt", data.class_names)
    name = ("--data", type(data).__name__)
    plain, server = tmp_path / "plain", tmp_path / "server"
    predict(path, photos, plain, *name)
    predict(path, photos, server, *name, "--predictions.server_format", "true")
    classes = np.array(Image.open(plain / "masks" / "a.png"))
    codes = Image.open(server / "masks" / "a.png")
    assert codes.mode == "L"
    assert np.array_equal(np.array(codes), np.array(data.mask_codes())[classes])
    shares = [json.loads((out / "shares.json").read_text()) for out in (plain, server)]
    assert shares[0] == shares[1]


# Going on


def test_a_second_run_does_what_is_missing_and_leaves_the_rest(
    checkpoint, photos, tmp_path, capsys
):
    out = tmp_path / "out"
    predict(checkpoint, photos, out)
    (out / "masks" / "b.png").unlink()
    before = {name: (out / name).stat().st_mtime_ns for name in files(out) if "/" in name}
    capsys.readouterr()
    predict(checkpoint, photos, out)
    assert "1 images done" in capsys.readouterr().out
    changed = {n for n, time in before.items() if (out / n).stat().st_mtime_ns != time}
    assert changed == {"overlays/b.png"}
    assert (out / "masks" / "b.png").is_file()
    assert len(json.loads((out / "shares.json").read_text())) == 4


def test_nothing_left_to_do_is_no_error(checkpoint, photos, tmp_path, caplog):
    predict(checkpoint, photos, tmp_path / "out")
    with caplog.at_level("INFO", logger="isanet_pl"):
        predict(checkpoint, photos, tmp_path / "out")
    assert "has its mask in" in caplog.text


def test_a_folder_of_other_predictions_is_refused(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "out")
    other = write_checkpoint(tmp_path / "other.ckpt", seed=1)
    for path, *more in ((other,), (checkpoint, "--model.inference.flip", "true")):
        with pytest.raises(InputError, match="of another checkpoint, other images or other"):
            predict(path, photos, tmp_path / "out", *more)
    # Frames of two cameras have the same names: they would be taken for done.
    shutil.copytree(photos, tmp_path / "camera2")
    with pytest.raises(InputError, match="of another checkpoint, other images or other"):
        predict(checkpoint, tmp_path / "camera2", tmp_path / "out")


def test_masks_that_nothing_is_known_of_are_refused(checkpoint, photos, tmp_path):
    predict(checkpoint, photos, tmp_path / "out")
    (tmp_path / "out" / "model.json").unlink()
    before = files(tmp_path / "out")
    with pytest.raises(InputError, match="choose another --output, or remove the folder"):
        predict(checkpoint, photos, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_mask_has_its_name_only_when_it_is_complete(checkpoint, photos, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    save = Image.Image.save

    def stop_in_the_middle(self, path, **options):
        if "masks" in str(path) and "b.png" in str(path):
            path.write_bytes(b"\x89PNG half")
            raise Killed
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", stop_in_the_middle)
    with pytest.raises(Killed):
        predict(checkpoint, photos, tmp_path / "out")
    assert files(tmp_path / "out" / "masks") == ["a.png"]
    monkeypatch.setattr(Image.Image, "save", save)
    predict(checkpoint, photos, tmp_path / "out")
    assert len(files(tmp_path / "out" / "masks")) == 4


# Broken input


def test_broken_files_are_told_at_the_end_and_stop_nothing(checkpoint, photos, tmp_path, capsys):
    (photos / "0 text.png").write_text("no image")
    (photos / "b2.jpg").write_bytes(b"")
    Image.new("L", (20000, 20000)).save(photos / "huge.png")
    with pytest.raises(InputError) as caught:
        predict(checkpoint, photos, tmp_path / "out")
    message = str(caught.value)
    assert "3 images could not be segmented" in message
    for name, reason in (
        ("0 text.png", "no image, or is damaged"),
        ("b2.jpg", "file is empty"),
        ("huge.png", "more than 178956970 pixels"),
    ):
        line = next(line for line in message.splitlines() if name in line)
        assert reason in line
    assert "--data.max_pixels" in message
    assert len(files(tmp_path / "out" / "masks")) == 4
    assert "4 images done" in capsys.readouterr().out


def test_an_image_too_large_for_the_memory_is_told_at_the_end(
    checkpoint, photos, tmp_path, monkeypatch
):
    forward = ISANet.forward

    def limited(network, x):
        if x.shape[-2:] == (40, 32):  # of b.jpg, padded
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(network, x)

    monkeypatch.setattr(ISANet, "forward", limited)
    with pytest.raises(InputError) as caught:
        predict(checkpoint, photos, tmp_path / "out")
    line = "b: out of memory at 31x40; try --model.inference.mode slide"
    assert "1 image could not be segmented" in str(caught.value)
    assert line in str(caught.value)
    assert files(tmp_path / "out" / "masks") == ["a.png", "c.png", "sub dir/ü.png"]
    monkeypatch.setattr(ISANet, "forward", forward)
    predict(checkpoint, photos, tmp_path / "out")
    assert len(files(tmp_path / "out" / "masks")) == 4


def test_another_error_of_the_network_ends_predict(checkpoint, photos, tmp_path, monkeypatch):
    def wrong(network, x):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ISANet, "forward", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        predict(checkpoint, photos, tmp_path / "out")


def test_the_limit_on_pixels_can_be_moved(checkpoint, photos, tmp_path):
    for name in ("a.png", "c.tif", "sub dir/ü.webp"):
        (photos / name).unlink()
    limit = 40 * 31
    with pytest.raises(InputError, match=f"more than {limit - 2} pixels"):
        predict(checkpoint, photos, tmp_path / "small", "--data.max_pixels", limit - 2)
    predict(checkpoint, photos, tmp_path / "large", "--data.max_pixels", limit)
    assert files(tmp_path / "large" / "masks") == ["b.png"]


def test_only_some_of_many_errors_are_listed(checkpoint, photos, tmp_path):
    for i in range(25):
        (photos / f"x{i}.png").write_text("no image")
    with pytest.raises(InputError, match=r"25 images could not [\s\S]*and 5 more") as caught:
        predict(checkpoint, photos, tmp_path / "out")
    assert str(caught.value).count("cannot read") == 20


def test_output_that_cannot_be_written(checkpoint, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/out.*choose another --output"):
        predict(checkpoint, photos, tmp_path / "file" / "out")


def test_disk_full_in_the_middle(checkpoint, photos, tmp_path, monkeypatch):
    save = Image.Image.save

    def full(self, path, **options):
        save(self, path, **options)
        if "b.png" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*b\.png: No space left.*goes on"):
        predict(checkpoint, photos, tmp_path / "out")
    assert files(tmp_path / "out") == [
        "masks/a.png", "model.json", "overlays/a.png"
    ]  # fmt: skip


def test_a_file_that_makes_pillow_raise_anything_is_told(checkpoint, photos, tmp_path, monkeypatch):
    def fail(path, max_pixels):
        if path.name == "b.jpg":
            raise RuntimeError("odd")
        return read_image(path, max_pixels)

    read_image = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", fail)
    with pytest.raises(InputError, match=r"1 image could not .*[\s\S]*b\.jpg: RuntimeError"):
        predict(checkpoint, photos, tmp_path / "out")
    assert len(files(tmp_path / "out" / "masks")) == 3


def test_an_output_inside_the_input_is_no_input(checkpoint, photos, tmp_path, capsys):
    for _ in range(3):
        predict(checkpoint, photos, photos / "found")
    assert len(files(photos / "found" / "masks")) == 4


def test_files_of_other_kinds_are_said(checkpoint, photos, tmp_path, caplog):
    for name in ("a.heic", "sub dir/b.HEIC", "notes.txt"):
        (photos / name).touch()
    with caplog.at_level("INFO", logger="isanet_pl"):
        predict(checkpoint, photos, photos / "found")
        predict(checkpoint, photos, photos / "found")  # its shares.json is no input
    said = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    assert [text.rsplit(": ", 1)[1] for text in said] == ["2 .heic, 1 .txt"] * 2


@pytest.mark.parametrize("out", [".", ".."])
def test_an_output_around_the_input_is_refused(checkpoint, photos, out):
    with fails_naming("--output", "holds --data.predict_dir", "give another --output"):
        predict(checkpoint, photos, photos / out)


def test_a_name_that_is_no_utf8_is_a_name(checkpoint, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 32)).save(photos / os.fsdecode(b"m\xfcller.png"))
    predict(checkpoint, photos, tmp_path / "out")
    shares = json.loads((tmp_path / "out" / "shares.json").read_text("utf-8"))
    assert list(shares) == [os.fsdecode(b"m\xfcller")]


def test_server_format_needs_to_know_the_codes(checkpoint, photos, tmp_path):
    with pytest.raises(InputError, match="server_format needs the data set"):
        predict(checkpoint, photos, tmp_path / "out", "--predictions.server_format", "true")


def test_the_mask_is_written_last(checkpoint, photos, tmp_path, monkeypatch):
    written = []
    replace = Path.replace

    def note(self, target):
        written.append(str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    predict(checkpoint, photos, tmp_path / "out", "--predictions.probabilities", "true")
    for name in ("a", "b", "c", "ü"):
        kinds = [p.split("/")[-2 if name != "ü" else -3] for p in written if f"/{name}." in p]
        assert kinds[-1] == "masks"
        assert sorted(kinds) == ["masks", "overlays", "probabilities"]


def test_settings_that_change_the_files_are_part_of_the_claim(photos, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", Cityscapes.class_names)
    data = ("--data", "Cityscapes")
    predict(path, photos, tmp_path / "out", *data)
    with pytest.raises(InputError, match="other settings"):
        predict(path, photos, tmp_path / "out", *data, "--predictions.server_format", "true")
    write_checkpoint(path, Cityscapes.class_names, seed=1)  # trained on
    with pytest.raises(InputError, match="another checkpoint"):
        predict(path, photos, tmp_path / "out", *data)


def test_lines_tell_the_progress_where_there_is_no_terminal(
    checkpoint, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Progress, "EVERY_SECONDS", 0.0)
    predict(checkpoint, photos, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    shares = [line.split(" %")[0] for line in lines if "min left" in line]
    assert shares == ["25", "50", "75", "100"]


# A checkpoint as its own config


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validation_without_a_config_needs_a_data_set_only(
    checkpoint, tmp_path, command, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([command, "--ckpt_path", str(checkpoint)])
    assert f"the following arguments are required: {command}.data" in capsys.readouterr().err


@pytest.mark.parametrize("base_size", [(48, 24), [48, 24]])  # of a checkpoint, an ONNX file
def test_validation_without_a_config(folder, tmp_path, base_size):
    path = write_checkpoint(tmp_path / "a.ckpt", inference={"base_size": base_size, "flip": True})
    arguments = ["validate", f"--ckpt_path={path}", "--data", "SegmentationFolder"]
    arguments += ["--data.root", str(folder), "--data.class_names", f"[{', '.join(NAMES)}]"]
    arguments += ["--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    cli = main([*arguments, "--runs_dir", str(tmp_path / "runs")])
    assert cli.model.network.arguments["form"] == "reduced"
    assert plain(cli.model.inference) == plain(Inference(flip=True, base_size=(48, 24)))
    assert (tmp_path / "runs" / "a" / "version_0" / "results.json").is_file()


@pytest.mark.parametrize("option", ["--data.base_size", "--data.init_args.base_size"])
def test_the_users_base_size_wins_over_the_checkpoints(tmp_path, option):
    path = write_checkpoint(tmp_path / "a.ckpt", inference={"base_size": [48, 24]})
    arguments = ["validate", "--ckpt_path", str(path), "--data", "SegmentationFolder"]
    assert with_config_of_checkpoint(arguments)[-1] == "--data.base_size=[48, 24]"
    for given in ([option, "[40, 20]"], [f"{option}=[40, 20]"]):
        assert with_config_of_checkpoint([*arguments, *given])[-len(given) :] == given


@pytest.mark.parametrize("value", ["[96, 64]", "null"])
@pytest.mark.parametrize("apart", [False, True])
def test_the_base_size_of_a_file_wins_over_the_checkpoints(tmp_path, value, apart):
    path = write_checkpoint(tmp_path / "a.ckpt", inference={"base_size": (48, 24)})
    data = f"{{class_path: SegmentationFolder, init_args: {{base_size: {value}}}}}"
    (tmp_path / "data.yaml").write_text(data)
    (tmp_path / "own.yaml").write_text(f"data: {'data.yaml' if apart else data}\n")
    arguments = ["validate", "--config", str(tmp_path / "own.yaml"), "--ckpt_path", str(path)]
    assert with_config_of_checkpoint(arguments)[-1] == str(path)


@pytest.mark.parametrize("spelling", ["{predict_dir: %s}", "{init_args: {predict_dir: %s}}"])
def test_options_of_the_data_and_the_checkpoint_may_stand_in_a_file(photos, tmp_path, spelling):
    path = write_checkpoint(tmp_path / "a.ckpt")
    own = tmp_path / "own.yaml"
    own.write_text(f"ckpt_path: {path}\ndata: {spelling % photos}\n")
    out = str(tmp_path / "out")
    main(["predict", "--config", str(own), "--output", out, "--trainer.accelerator", "cpu"])
    assert len(files(tmp_path / "out" / "masks")) == 4


def test_options_in_a_file_leave_the_checkpoint_its_network(photos, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", inference={"base_size": [40, 20]})
    own = "predictions: {probabilities: true}\nmodel: {inference: {flip: true}}\n"
    (tmp_path / "more.yaml").write_text(own)
    arguments = ["predict", "--config", str(tmp_path / "more.yaml"), "--ckpt_path", str(path)]
    arguments += ["--data.predict_dir", str(photos), "--output", str(tmp_path / "out")]
    cli = main([*arguments, "--data.num_workers", "0", "--trainer.accelerator", "cpu"])
    assert any((tmp_path / "out" / "probabilities").iterdir())
    assert cli.model.inference.flip is True
    assert tuple(cli.model.inference.base_size) == (40, 20)


def test_a_config_of_a_network_is_taken_instead_of_the_checkpoints(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "whole.yaml").write_text("model: {network: {context: none}}\n")
    for config in (["-c", str(tmp_path / "whole.yaml")], ["--config={model: whole.yaml}"]):
        arguments = ["predict", *config, "--ckpt_path", str(path)]
        assert with_config_of_checkpoint(arguments) == arguments


def test_of_several_checkpoints_the_last_is_described(checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "other.ckpt", context="none")
    paths = [part for path in (checkpoint, other) for part in ("--ckpt_path", str(path))]
    config = json.loads(with_config_of_checkpoint(["predict", *paths])[2])
    assert config["model"]["network"]["context"] == "none"


def test_a_long_config_of_the_command_line_counts(checkpoint):
    config = json.dumps({"model": {"network": {"context": "none"}}, "name": "x" * 300})
    arguments = ["predict", "--config", config, "--ckpt_path", str(checkpoint)]
    assert with_config_of_checkpoint(arguments) == arguments


def test_left_and_right_classes_travel_with_the_checkpoint(photos, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", inference={"mirrored_classes": [[1, 2]]})
    cli = predict(path, photos, tmp_path / "out", "--model.inference.flip", "true")
    assert plain(cli.model.inference)["mirrored_classes"] == [[1, 2]]


def test_a_checkpoint_with_missing_weights_is_refused(checkpoint, photos, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]["network.classifier.bias"]
    torch.save(content, tmp_path / "cut.ckpt")
    with pytest.raises(InputError, match=r"1 of its \d+ tensors .* network\.classifier\.bias"):
        predict(tmp_path / "cut.ckpt", photos, tmp_path / "out")
    with pytest.raises(ValueError, match=r"damaged or of another version.*classifier\.bias"):
        ISANet.from_checkpoint(tmp_path / "cut.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["network"]["newer"] = 1
    torch.save(content, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match=r"not a checkpoint of isanet-pl as it is now.*newer"):
        ISANet.from_checkpoint(tmp_path / "newer.ckpt")
    for text in (b"text", None):
        path = tmp_path / "other.ckpt"
        path.write_bytes(text) if text else torch.save({"state_dict": {}}, path)
        with pytest.raises(ValueError, match=r"checkpoint of isanet-pl: it (is damaged|does not)"):
            ISANet.from_checkpoint(path)


@pytest.mark.parametrize("command", ["fit", "export"])
def test_an_exported_network_is_no_checkpoint(tmp_path, command):
    (tmp_path / "a.onnx").write_text("")
    with pytest.raises(InputError, match=f"{command} needs a checkpoint; .* exported"):
        main([command, "--ckpt_path", str(tmp_path / "a.onnx"), "--config", QUICKSTART])


def test_what_is_no_checkpoint_is_said(tmp_path, photos):
    (tmp_path / "a.ckpt").write_text("text")
    with pytest.raises(InputError, match="not a checkpoint, or is truncated"):
        predict(tmp_path / "a.ckpt", photos, tmp_path / "out")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="not a checkpoint of isanet-pl"):
        predict(tmp_path / "b.ckpt", photos, tmp_path / "out")
    with pytest.raises(InputError, match="checkpoint not found"):
        predict(tmp_path / "c.ckpt", photos, tmp_path / "out")
    shutil.copy(tmp_path / "b.ckpt", tmp_path / "b.pt2")
    for name, reason in (("b.ckpt", "does not describe its network"), ("b.pt2", "is an exported")):
        for use in (ISANet.from_checkpoint, lambda path: predict(path, photos, tmp_path / "out")):
            with pytest.raises(ValueError, match=reason):
                use(tmp_path / name)


def test_a_malicious_checkpoint_does_not_execute(tmp_path, photos):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"state_dict": Bomb(), "hyper_parameters": {}}, tmp_path / "bomb.ckpt")
    with pytest.raises(InputError, match="more than data: nothing in it was executed") as error:
        predict(tmp_path / "bomb.ckpt", photos, tmp_path / "out")
    assert "weights_only" not in str(error.value)  # torch would advise to execute it
    assert not (tmp_path / "exploded").exists()
