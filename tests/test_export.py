"""Exported files: the same answers as the network's, also through the command line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import fails_naming, make_folder, make_scene
from PIL import Image
from test_predictions import NAMES, PALETTE, write_checkpoint

from isanet_pl.checkpoints import config_of
from isanet_pl.cli import main
from isanet_pl.errors import InputError
from isanet_pl.export import read_images, size_multiples
from isanet_pl.exported import METADATA, OnnxNetwork, read_metadata
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet
from isanet_pl.pixels import rgb_pixels


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.ckpt")


def export(checkpoint, path, *args):
    fixed = ("--trainer.accelerator", "cpu", "--ckpt_path", str(checkpoint), "--path", str(path))
    return main(["export", *fixed, *map(str, args)])


@pytest.fixture(scope="module")
def fixed(checkpoint, tmp_path_factory):
    """An ONNX file for images of 24x40."""
    path = tmp_path_factory.mktemp("fixed") / "new" / "fixed.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isanet-pl"])
        export(checkpoint, path, "--size", "[24, 40]")
    return path


@pytest.fixture
def written(fixed, monkeypatch):
    """Spares tests of what happens once a file for 24x40 is written the seconds of writing it."""
    monkeypatch.setattr(
        "isanet_pl.trainer.write_onnx", lambda program, file, metadata: shutil.copy(fixed, file)
    )


@pytest.fixture(scope="module")
def dynamic(checkpoint, tmp_path_factory):
    """An ONNX file for images of any multiple of 16."""
    path = tmp_path_factory.mktemp("dynamic") / "dynamic.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isanet-pl"])
        export(checkpoint, path, "--size", "[32, 48]", "--dynamic", "true")
    return path


def images(*size, count=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def run_onnx(path, array):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": array.numpy()})[0])


def eager(checkpoint, image):
    network = ISANet.from_checkpoint(checkpoint)
    with torch.no_grad():
        return network(network.normalise(image))["out"]


def close(found, expected):
    return float((found - expected).abs().max() / expected.abs().max()) < 1e-5


# The files


@pytest.mark.parametrize("count", [1, 3])
def test_onnx_takes_uint8_images_in_batches_of_any_size(checkpoint, fixed, count):
    image = images(24, 40, count=count)
    assert close(run_onnx(fixed, image), eager(checkpoint, image))


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (16, 16), (80, 112)])
def test_dynamic_onnx_takes_multiples(checkpoint, dynamic, size):
    image = images(*size)
    assert close(run_onnx(dynamic, image), eager(checkpoint, image))


def test_normalisation_outside(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]", "--normalise", "outside")
    image = images(24, 40)
    x = ISANet.from_checkpoint(checkpoint).normalise(image).contiguous()
    assert close(run_onnx(tmp_path / "a.onnx", x), eager(checkpoint, image))


@pytest.mark.parametrize("context", ["isa", "dense", "ppm", "aspp", "rcca"])
def test_onnx_of_the_direct_form_and_of_other_contexts(context, tmp_path):
    arguments = {"form": "direct", "context": context, "aux_head": True}
    checkpoint = write_checkpoint(tmp_path / "tiny.ckpt", **arguments)
    export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]")
    image = images(24, 40)
    assert close(run_onnx(tmp_path / "a.onnx", image), eager(checkpoint, image))


def test_a_file_of_one_size_pads_by_itself(tmp_path):
    view = {"mode": "whole", "crop_size": None, "stride": None, "pad_multiple": 64}
    checkpoint = write_checkpoint(tmp_path / "tiny.ckpt", inference=view)
    export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]")
    assert config_of(str(tmp_path / "a.onnx"), "predict")["model"]["inference"]["mode"] == "slide"
    (tmp_path / "photos").mkdir()
    photo = make_scene(0, (20, 36), [0, 1, 2])[0]
    Image.fromarray(photo).save(tmp_path / "photos" / "b.png")
    options = ("--ckpt_path", "a.onnx", "--data.predict_dir", "photos", "--output", "out")
    main(["predict", *options, "--trainer.accelerator", "cpu", "--data.num_workers", "0"])
    network = ISANet.from_checkpoint(checkpoint)
    x = torch.zeros(1, 3, 24, 40)
    x[..., :20, :36] = network.normalise(torch.from_numpy(photo).permute(2, 0, 1)[None])
    with torch.no_grad():
        expected = network(x)["out"][0, :, :20, :36].argmax(0)
    found = np.array(Image.open(tmp_path / "out" / "masks" / "b.png"))
    assert np.mean(found == expected.numpy()) > 0.99  # the file's padding is rounded to uint8


def test_a_dynamic_archive_takes_two_windows_and_more(tmp_path, caplog):
    # Made at the size that comes next to the checkpoint's windows, as none is given: 32x48.
    view = {"mode": "slide", "crop_size": (24, 40), "base_size": (90, 60), "flip": True}
    checkpoint = write_checkpoint(tmp_path / "tiny.ckpt", inference=view)
    caplog.set_level("INFO", "isanet_pl")
    export(checkpoint, tmp_path / "a.pt2", "--dynamic", "true")
    assert (
        "made for images scaled to fit (90, 60) (long and short edge) and windows of (24, 40), "
        "(16, 26) apart and views at [1.0] times the size, mirrored too: the file leaves"
    ) in caplog.text
    files = {"isanet_pl.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    for size in ((32, 32), (32, 64), (96, 48)):
        image = images(*size, count=2)
        assert close(program(image), eager(checkpoint, image))
    assert json.loads(files["isanet_pl.json"])["class_names"] == list(NAMES)


def test_files_say_what_they_are(fixed, dynamic):
    model = onnx.load(fixed)
    onnx.checker.check_model(model)
    assert {p.key: p.value for p in model.metadata_props}["classes"] == "sky, road, car"
    assert [path.name for path in fixed.parent.iterdir()] == ["fixed.onnx"]  # weights inside
    description = read_metadata(fixed)
    assert description["palette"] == [list(colour) for colour in PALETTE]
    assert description["size"] == [24, 40]
    assert description["normalise"] == "inside"
    assert read_metadata(dynamic)["size"] is None
    assert read_metadata(dynamic)["multiples"] == [16, 16]


def test_the_auxiliary_head_is_left_out(checkpoint, fixed):
    assert ISANet.from_checkpoint(checkpoint).aux_head is not None
    weights = sum(np.prod(w.dims) for w in onnx.load(fixed).graph.initializer)
    network = ISANet.from_checkpoint(checkpoint)
    total = sum(p.numel() for p in network.parameters())
    aux = sum(p.numel() for p in network.aux_head.parameters())
    assert weights < total - 0.9 * aux


def test_multiples_cover_all_windows():
    network = ISANet(2, "resnet18", last_stage=2, down_factors=((8, 4), (6, 1)), key_channels=4,
                     value_channels=4, out_channels=4)  # fmt: skip
    assert size_multiples(network) == (8 * 24, 8 * 4)
    options = {"last_stage": 1, "down_factors": ((5, 20),), "key_channels": 4, "value_channels": 4}
    network = ISANet(2, "resnet18", **options, out_channels=4)
    assert size_multiples(network) == (4 * 5, 4 * 20)
    network = ISANet(2, "resnet18", **options, out_channels=4, context="none")
    assert size_multiples(network) == (4, 4)


@pytest.mark.usefixtures("written")
def test_export_says_how_the_file_compares(checkpoint, tmp_path, capsys):
    folder = make_folder(tmp_path / "data")
    export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]", "--images", folder / "train")
    out = capsys.readouterr().out
    assert "on 4 inputs" in out  # a random batch and three images
    assert "100.000 % of the pixels in the same class" in out
    assert "latency of one 24x40 image" in out


@pytest.mark.usefixtures("written")
def test_a_file_that_answers_otherwise_is_refused(checkpoint, tmp_path, monkeypatch):
    from isanet_pl import trainer as module

    right = module.onnx_runner
    for factor, said in ((1.001, "1.0e-03"), (0.999, "1.0e-03"), (float("nan"), "nan")):
        wrong = lambda path, factor=factor: lambda x: right(path)(x) * factor  # noqa: E731
        monkeypatch.setattr(module, "onnx_runner", wrong)
        with pytest.raises(InputError, match=f"other results.*{said}"):
            export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]")
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("written")
def test_a_file_that_does_not_run_is_refused(checkpoint, tmp_path, monkeypatch):
    def run(x):
        raise RuntimeError("Reshape node")

    monkeypatch.setattr("isanet_pl.trainer.onnx_runner", lambda path: run)
    with pytest.raises(InputError, match=r"a\.onnx does not run on \(2, 3, 24, 40\): Reshape"):
        export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]")
    assert not list(tmp_path.iterdir())


def test_ceil_mode_is_exported_for_one_size(tmp_path):
    path = write_checkpoint(tmp_path / "ceil.ckpt", ceil_mode=True)
    with pytest.raises(InputError, match=r"--dynamic true cannot .* ceil_mode"):
        export(path, tmp_path / "a.onnx", "--size", "[32, 48]", "--dynamic", "true")
    export(path, tmp_path / "a.onnx", "--size", "[32, 48]")
    export(path, tmp_path / "a.pt2", "--size", "[32, 48]", "--dynamic", "true")


def test_a_file_smaller_than_the_windows_of_its_checkpoint_has_its_own(tmp_path):
    windows = {"mode": "slide", "crop_size": (65, 65), "stride": (33, 33)}
    path = write_checkpoint(tmp_path / "slide.ckpt", inference=windows)
    export(path, tmp_path / "a.onnx", "--size", "[32, 128]")
    assert windows_of(tmp_path / "a.onnx") == ([32, 128], None)
    model = onnx.load(tmp_path / "a.onnx")
    [own] = [prop for prop in model.metadata_props if prop.key == METADATA]
    own.value = json.dumps({**json.loads(own.value), "size": [80, 80]})
    onnx.save(model, tmp_path / "b.onnx")
    assert windows_of(tmp_path / "b.onnx") == ([65, 65], [33, 33])


def windows_of(path):
    inference = config_of(path, "predict")["model"]["inference"]
    return inference["crop_size"], inference["stride"]


def test_a_place_that_cannot_be_written_is_named(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.onnx", tmp_path / "file" / "b" / "a.onnx"):
        with pytest.raises(InputError, match=rf"cannot write {path}: .*--path"):
            export(checkpoint, path, "--size", "[24, 40]")


@pytest.mark.usefixtures("written")
def test_int8(checkpoint, tmp_path, fixed, monkeypatch):
    from isanet_pl import trainer as module

    calibrated, quantise = [], module.quantise
    monkeypatch.setattr(
        module, "quantise", lambda file, inputs: (calibrated.extend(inputs), quantise(file, inputs))
    )
    folder = make_folder(tmp_path / "data", size=(24, 40))
    options = ("--size", "[24, 40]", "--images", folder / "train" / "images", "--int8", "true")
    export(checkpoint, tmp_path / "a.onnx", *options)
    types = {w.data_type for w in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    weights = [
        onnx.numpy_helper.to_array(w)
        for w in onnx.load(tmp_path / "a.onnx").graph.initializer
        if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4
    ]
    assert max(int(abs(w.astype(int)).max()) for w in weights) <= 64  # 7 bits
    assert (tmp_path / "a.onnx").stat().st_size < 0.5 * fixed.stat().st_size
    assert read_metadata(tmp_path / "a.onnx")["class_names"] == list(NAMES)
    scenes = [Image.open(path) for path in sorted((folder / "train" / "images").iterdir())]
    image = torch.stack([rgb_pixels(scene) for scene in scenes])
    found, expected = run_onnx(tmp_path / "a.onnx", image), eager(checkpoint, image)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert 1e-5 < error < 0.1  # 0.05; 0.2 where products overflow, on a CPU without VNNI
    assert torch.cat(calibrated).equal(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--path", "a.bin"), r"a\.bin: the name must end in \.onnx or \.pt2"),
        (("--size", "[0, 8]"), r"--size must be two positive integers, got \(0, 8\)"),
        (("--size", "[24, 40]", "--dynamic", "true"), r"multiples of \(16, 16\).*\(24, 40\)"),
        (("--int8", "true"), "--int8 true needs an .onnx file and --images"),
        (
            ("--path", "a.pt2", "--size", "[16, 48]", "--dynamic", "true"),
            r"a \.pt2 file takes sizes from \(32, 32\) on, two windows a side: got \(16, 48\)",
        ),
        (("--path", "a.pt2", "--int8", "true", "--images", "."), "needs an .onnx file"),
        (("--images", "nowhere"), "folder not found: nowhere"),
        (("--num_calibration", "0"), "--num_calibration must be 1 or more: 0"),
    ],
)
def test_wrong_options_are_refused(checkpoint, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        export(checkpoint, tmp_path / "a.onnx", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, range(5)), (9, range(5))],
)
def test_images_to_calibrate_with_are_evenly_chosen(tmp_path, count, expected):
    for i in range(5):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    chosen = read_images(tmp_path, (2, 2), count)
    assert [int(image[0, 0, 0, 0]) for image in chosen] == list(expected)


def test_without_onnx_it_is_said_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="onnxscript is not installed: pip install onnx"):
        export(checkpoint, tmp_path / "a.onnx", "--size", "[24, 40]")


# Used by the command line


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_predict_takes_an_onnx_file(checkpoint, request, tmp_path, name):
    path = request.getfixturevalue(name)
    (tmp_path / "photos").mkdir()
    Image.fromarray(make_scene(0, (24, 40) if name == "fixed" else (32, 48), [0, 1, 2])[0]).save(
        tmp_path / "photos" / "a.png"
    )
    Image.fromarray(make_scene(1, (50, 70), [0, 1, 2])[0]).save(tmp_path / "photos" / "large.png")
    out = tmp_path / "out"
    where = ["--data.predict_dir", str(tmp_path / "photos"), "--output", str(out)]
    main(["predict", "--ckpt_path", str(path), *where, "--trainer.accelerator", "cpu"])
    network = ISANet.from_checkpoint(checkpoint)
    with Image.open(tmp_path / "photos" / "a.png") as image:
        expected = network.predict(image)
    assert np.array_equal(np.array(Image.open(out / "masks" / "a.png")), expected)
    large = np.array(Image.open(out / "masks" / "large.png"))
    assert large.shape == (50, 70)
    if name == "fixed":  # by windows of its size
        network.inference, least = Inference(mode="slide", crop_size=(24, 40)), 0.999
    else:  # padded to its multiples, with what is rounded to uint8
        network.inference, least = Inference(pad_multiple=16), 0.99
    with Image.open(tmp_path / "photos" / "large.png") as image:
        assert np.mean(large == network.predict(image).numpy()) > least


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_takes_an_onnx_file(checkpoint, dynamic, tmp_path, command):
    folder = make_folder(tmp_path / "data", size=(32, 48))
    data = ["--data", "SegmentationFolder", "--data.root", str(folder), "--data.num_workers", "0"]
    data += ["--data.class_names", f"[{', '.join(NAMES)}]", "--trainer.accelerator", "cpu"]
    scores, results = [], []
    for path in (checkpoint, dynamic):
        cli = main([command, "--ckpt_path", str(path), *data])
        stage = "val" if command == "validate" else "test"
        scores.append(float(cli.trainer.callback_metrics[f"{stage}/miou"]))
        results.append(json.loads((Path(cli.trainer.log_dir) / "results.json").read_text()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert results[0]["step"] == 7
    assert results[0]["parameters"] > 0
    # The file does not say.
    assert results[1]["step"] is results[1]["parameters"] is results[1]["gmacs"] is None


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("names", ["[road, sky, car]", "[sky, road, car, tree]"])
def test_an_onnx_file_of_other_classes_is_refused(dynamic, tmp_path, command, names, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "data", size=(32, 48))
    data = ["--data", "SegmentationFolder", "--data.root", str(folder), "--data.num_workers", "0"]
    data += ["--data.class_names", names, "--trainer.accelerator", "cpu"]
    if command == "predict":
        data += ["--data.predict_dir", str(folder / "test" / "images")]
    with fails_naming("trained for 3 classes (sky, road, car), but the data has", names[1:-1]):
        main([command, "--ckpt_path", str(dynamic), *data])
    assert not list(tmp_path.glob("runs/*/*"))


def test_images_that_do_not_fit_are_padded_and_cropped(fixed, dynamic):
    x = torch.randn(1, 3, 20, 30)
    for path, size in ((fixed, (24, 40)), (dynamic, (32, 32))):
        network = OnnxNetwork(path)
        found = network(x)["out"]
        assert found.shape == (1, 3, 20, 30)
        wide = torch.zeros(1, 3, *size)
        wide[:, :, :20, :30] = x
        assert torch.allclose(found, network(wide)["out"][:, :, :20, :30], atol=1e-5)


def test_an_image_larger_than_the_file_takes_is_refused(fixed):
    with pytest.raises(InputError, match=r"takes images of 40x24 .*crop_size '\[24, 40\]'.*null"):
        OnnxNetwork(fixed)(torch.zeros(1, 3, 25, 40))


def test_a_foreign_onnx_file_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("text")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "empty.onnx")
    for name in ("text", "empty"):
        with pytest.raises(InputError, match=f"{name}.onnx was not written by isanet-pl export"):
            main(["predict", "--ckpt_path", str(tmp_path / f"{name}.onnx")])
