"""Checkpoints of mmsegmentation and openseg.pytorch: equal outputs, and what is refused."""

import functools
import io
import os
import pickle
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import fails_naming, make_folder, truncate
from foreign_nets import (
    CLASSES,
    PALETTE,
    PIPELINE_1,
    SLIDE,
    empty_state,
    mmseg_config,
    mmseg_file,
    mmseg_layout,
    openseg_layout,
    random_state,
    run_mmseg,
    run_openseg,
)
from torch import nn

from isanet_pl.cli import main
from isanet_pl.convert import (
    Trained,
    read_mmseg,
    read_openseg,
    read_trained,
    write_checkpoint,
    write_mmseg,
)
from isanet_pl.convert.trained import Classes
from isanet_pl.data import ADE20K, LIP, Cityscapes, SegmentationFolder
from isanet_pl.data.palette import default_palette
from isanet_pl.inference import Inference, resize_logits
from isanet_pl.losses import SegmentationLoss
from isanet_pl.models import ISANet
from isanet_pl.module import SegmentationModule

WHOLE = Inference(pad_multiple=1)  # neither project pads
SIZES = [(72, 88), (57, 49)]  # even and odd, neither a multiple of 64


def save(content, path):
    torch.save(content, path)
    return path


def pixels(size):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def outputs(network, x):
    """Returns main and auxiliary logits in float64, both at the size of the input."""
    network = network.double().eval()
    before, _ = network.backbone(x)
    aux = resize_logits(network.aux_head(before), x.shape[2:], network.align_corners)
    return network(x)["out"], aux


def assert_equal(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert other.std() > 0.01  # not a comparison of nothing
        assert (mine - other).abs().max() < tolerance * other.abs().max()


@pytest.fixture(scope="module")
def mmseg_state():
    return random_state(mmseg_layout())


@pytest.fixture(scope="module")
def mmseg_path(mmseg_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("mmseg") / "isanet_r50-d8.pth"
    config = mmseg_config().replace("(2049, 1025)", "(96, 64)")
    return save(mmseg_file(mmseg_state, config), path)


@pytest.fixture(scope="module")
def converted(mmseg_path):
    """The network that `mmseg_path` becomes, and the checkpoint of it."""
    target = mmseg_path.with_suffix(".ckpt")
    write_checkpoint(read_mmseg(mmseg_path), target)
    return target


# mmsegmentation.


@pytest.mark.parametrize("size", SIZES)
def test_mmseg_outputs_are_equal(converted, mmseg_state, size):
    network = ISANet.from_checkpoint(converted)
    assert network.arguments["backbone"] == "resnet50c"
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    assert_equal(outputs(network, x), run_mmseg(mmseg_state, x, corners=False), 1e-12)


def test_mmseg_deep_outputs_with_aligned_corners_and_no_counters_are_equal(tmp_path):
    state = random_state(mmseg_layout(101, counter=False))
    path = save(mmseg_file(state), tmp_path / "isanet_r101-d8_769x769_40k.pth")
    network = read_mmseg(path).network
    assert network.arguments["backbone"] == "resnet101c"
    x = torch.randn(1, 3, 57, 65, dtype=torch.float64)
    assert_equal(outputs(network, x), run_mmseg(state, x, corners=True), 1e-12)


def test_there_and_back_is_the_same_to_the_bit(converted, mmseg_state, tmp_path):
    write_mmseg(read_trained(converted), tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["state_dict"].keys() == mmseg_state.keys()
    for name, value in mmseg_state.items():
        assert back["state_dict"][name].dtype == value.dtype
        assert back["state_dict"][name].equal(value), name
    assert back["meta"]["dataset_meta"] == {"classes": list(CLASSES), "palette": PALETTE}
    # What it says about itself is understood, too.
    again = read_mmseg(tmp_path / "back.pth")
    assert again.steps == 80000
    assert again.network.arguments == ISANet.from_checkpoint(converted).arguments


def test_the_layouts_have_as_many_tensors_as_described():
    for depth, total in ((50, 416), (101, 722)):
        assert len(dict(mmseg_layout(depth))) == total


@pytest.mark.parametrize("corners", [False, True])
def test_network_of_the_authors_form_is_exported_equal(corners, tmp_path):
    torch.manual_seed(0)
    network = ISANet(
        3, "resnet50s", form="reduced", aux_channels=32, context_first=False, value_bias=False,
        align_corners=corners, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0),
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
    write_mmseg(Trained(network, Classes(CLASSES, PALETTE)), tmp_path / "theirs.pth")
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["state_dict"]
    x = torch.randn(1, 3, 57, 49, dtype=torch.float64)
    assert_equal(outputs(network, x), run_mmseg(theirs, x, corners), 1e-12)
    again = read_mmseg(tmp_path / "theirs.pth").network.arguments
    assert again["backbone"] == "resnet50s"
    assert (again["mean"], again["std"]) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert again["align_corners"] == corners


@functools.cache
def network_of(num_classes, corners):
    return ISANet(num_classes, "resnet50c", form="reduced", aux_head=True, align_corners=corners)


def write_and_read(inference, path, names=CLASSES, corners=False):
    """Returns how images are shown according to a file of mmsegmentation for a network of ours."""
    network = network_of(len(names), corners)
    network.inference = inference
    write_mmseg(Trained(network, Classes(names, default_palette(len(names)))), path)
    return read_mmseg(path).network.inference


@pytest.mark.parametrize("base_size", [(96, 64), None])
def test_base_size_travels(base_size, tmp_path, caplog):
    inference = Inference(base_size=base_size, pad_multiple=1)
    found = write_and_read(inference, tmp_path / "theirs.pth", ADE20K.class_names)
    assert found == inference  # and not what is usual for ADE20K
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("inference", "corners", "words"),
    [
        (Inference(), False, []),  # theirs pads whole images as well
        (Inference(), True, []),  # nothing is padded
        (Inference("slide", (97, 97), (65, 65)), True, []),
        (Inference("slide", (97, 97), (65, 65)), False, ["padding to multiples of 8"]),
        (
            Inference("slide", (97, 97), (65, 65), scales=(0.5, 1.0), flip=True),
            True,
            ["scales [0.5, 1.0], flip"],
        ),
        (Inference(pad_multiple=64), True, []),
        (
            Inference("slide", (97, 97), (65, 65), pad_multiple=32),
            True,
            ["padding to multiples of 32"],
        ),
    ],
)
def test_what_does_not_travel_is_said(inference, corners, words, tmp_path, caplog):
    write_and_read(inference, tmp_path / "theirs.pth", corners=corners)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path / 'theirs.pth'}: not written, as no model of mmsegmentation has it: {word}"
        for word in words
    ]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("form", "direct"),
        ("context", "none"),
        ("order", "short_long"),
        ("mask_padding", True),
        ("negative_slope", 0.01),
        ("ceil_mode", True),
        ("output_stride", 16),
        ("backbone", "resnet50"),
        ("down_factors", [(8, 8), (4, 4)]),
        ("value_channels", 256),
    ],
)
def test_what_mmseg_has_no_equal_of_is_refused(argument, value, tmp_path):
    with torch.device("meta"):
        network = ISANet(3, **{"backbone": "resnet50c", "form": "reduced", argument: value})
    trained = Trained(network, Classes(CLASSES, PALETTE))
    with fails_naming("theirs.pth", "no equal network", argument):
        write_mmseg(trained, tmp_path / "theirs.pth")
    assert not (tmp_path / "theirs.pth").exists()


# What the files say besides.


def read_empty(tmp_path, content=None, name="isanet_512x1024.pth", num_classes=3, **options):
    """Returns what is read from a file whose weights are all zero."""
    state = empty_state(mmseg_layout(num_classes=num_classes))
    content = mmseg_file(state) if content is None else {"state_dict": state, **content}
    return read_mmseg(save(content, tmp_path / name), **options)


def meta(config=None, **more):
    return {"meta": mmseg_file({}, config, **more)["meta"]}


def test_old_config_is_understood(tmp_path):
    trained = read_empty(tmp_path, meta(mmseg_config(True, SLIDE)), "any.pth")
    assert trained.network.arguments["align_corners"] is True
    slide = Inference("slide", (769, 769), (513, 513), pad_multiple=1, base_size=(2049, 1025))
    assert trained.network.inference == slide
    assert trained.steps == 80000
    assert list(trained.classes.names) == list(CLASSES)
    assert trained.classes.palette == [tuple(colour) for colour in PALETTE]


def test_old_config_with_its_test_settings_outside_the_model_is_understood(tmp_path):
    config = mmseg_config(True) + f"test_cfg = dict({SLIDE})\n"
    assert read_empty(tmp_path, meta(config)).network.inference.stride == (513, 513)


def test_new_config_is_understood(tmp_path):
    config = mmseg_config(rest=PIPELINE_1).replace(
        "type='EncoderDecoder',",
        "type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', bgr_to_rgb=True,"
        "mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], size=(512, 512)),",
    )
    config = config.replace("down_factor=(8, 8)", "down_factor=(4, 8)")
    classes = {"classes": CLASSES, "palette": PALETTE}
    about = {"cfg": config, "dataset_meta": classes, "iter": 160000, "mmengine_version": "0.7"}
    trained = read_empty(tmp_path, {"meta": about, "message_hub": {}}, "any.pth")
    arguments = trained.network.arguments
    assert (arguments["mean"], arguments["std"]) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert arguments["align_corners"] is False
    assert arguments["down_factors"] == [(4, 8)]
    assert trained.network.inference == Inference(pad_multiple=1, base_size=(2048, 512))
    assert (trained.steps, list(trained.classes.names)) == (160000, list(CLASSES))


def test_bgr_network_is_turned(mmseg_state, tmp_path):
    config = mmseg_config().replace("to_rgb=True", "to_rgb=False")
    path = save(mmseg_file(mmseg_state, config), tmp_path / "bgr.pth")
    network = read_mmseg(path).network.double()
    image = pixels((57, 49))
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
    theirs = run_mmseg(mmseg_state, (image.flip(1) - mean) / std, corners=False)
    assert_equal(outputs(network, network.normalise(image)), theirs, 1e-6)


@pytest.mark.parametrize(
    ("name", "corners", "inference"),
    [
        ("isanet_r50-d8_512x1024_40k_cityscapes_20210901_054739-981bd763.pth", False, WHOLE),
        (
            "isanet_r50-d8_769x769_40k_cityscapes_20210903_050200-4ae7e65b.pth",
            True,
            Inference("slide", (769, 769), (513, 513), pad_multiple=1),
        ),
        ("isanet_r50-d8_4xb4-80k_ade20k-512x512.pth", False, WHOLE),
    ],
)
def test_name_of_a_published_file_tells_what_its_config_does_not(
    name, corners, inference, tmp_path
):
    trained = read_empty(tmp_path, name=name)
    assert trained.network.arguments["align_corners"] is corners
    assert trained.network.inference == inference


def test_neither_config_nor_name_is_refused_unless_the_option_tells(tmp_path):
    with fails_naming("model_20210901.pth", "align_corners", "--align-corners true"):
        read_empty(tmp_path, name="model_20210901.pth")
    for corners in (True, False):
        trained = read_empty(tmp_path, name="model_20210901.pth", align_corners=corners)
        assert trained.network.arguments["align_corners"] is corners


def test_option_overrides_the_config(tmp_path):
    trained = read_empty(tmp_path, meta(mmseg_config(True)), align_corners=False)
    assert trained.network.arguments["align_corners"] is False


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mmseg_config().replace("style='pytorch'", "style='caffe'"), ["style", "caffe"]),
        (mmseg_config().replace("(1, 2, 1, 1)", "(1, 2, 2, 1)"), ["strides", "[1, 2, 2, 1]"]),
        (mmseg_config().replace("contract_dilation=True", "contract_dilation=False"), ["False"]),
    ],
)
def test_other_backbones_with_the_same_tensors_are_refused(config, words, tmp_path):
    with fails_naming("isanet_512x1024.pth", *words, "can be converted"):
        read_empty(tmp_path, meta(config))


@pytest.mark.parametrize("config", ["model = dict(", "model = open('x')", 7, "(" * 3000])
def test_config_that_says_nothing_is_as_none(config, tmp_path):
    trained = read_empty(tmp_path, {"meta": {"config": config, "CLASSES": CLASSES}})
    assert trained.network.arguments["align_corners"] is False  # by the name
    assert len(trained.classes.palette) == 3


def test_config_is_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    config = f"a = __import__('os').mkdir({str(sprung)!r})\nmodel = dict(type=exec('1/0'))"
    read_empty(tmp_path, meta(config))
    assert not sprung.exists()


def test_known_classes_get_the_names_of_the_data_set(tmp_path):
    theirs = [name + " " if name in ("bed", "bridge") else name for name in ADE20K.class_names]
    content = {"meta": {"CLASSES": tuple(theirs)}}
    trained = read_empty(tmp_path, content, num_classes=150)
    assert tuple(trained.classes.names) == ADE20K.class_names
    assert trained.classes.palette == list(ADE20K.palette)
    assert trained.network.inference.base_size == (2048, 512)


def test_option_names_the_classes(tmp_path):
    trained = read_empty(tmp_path, {"meta": {}}, "isanet_769x769.pth", 19, data_set="cityscapes")
    assert tuple(trained.classes.names) == Cityscapes.class_names
    assert trained.network.inference.base_size == (2049, 1025)


def test_sides_of_lip_are_kept(tmp_path):
    trained = read_empty(tmp_path, {"meta": {}}, num_classes=20, data_set="lip")
    assert trained.network.inference.mirrored_classes == LIP.mirrored_classes
    state = empty_state(openseg_layout(num_classes=20))
    trained = read_openseg_content(tmp_path, state, None, data_set="lip")
    assert trained.network.inference.mirrored_classes == LIP.mirrored_classes


def test_classes_without_names_are_refused(tmp_path):
    with fails_naming("isanet_512x1024.pth", "does not name its classes", "--data-set"):
        read_empty(tmp_path, {"meta": {}})


def test_other_number_of_classes_is_refused(tmp_path):
    with fails_naming("3 classes", "cityscapes names 19"):
        read_empty(tmp_path, data_set="cityscapes")


@pytest.mark.parametrize("ratio", ["keep_ratio=False, ", ""])
def test_a_config_that_stretches_images_is_refused(tmp_path, ratio):
    pipeline = PIPELINE_1.replace("keep_ratio=True, ", ratio)
    with fails_naming("stretches images"):
        read_empty(tmp_path, meta(mmseg_config(rest=pipeline)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("contract_dilation=True", "multi_grid=(1, 2, 4)", "multi_grid [1, 2, 4]"),
        ("dropout_ratio=0.1", "act_cfg=dict(type='LeakyReLU')", "type LeakyReLU; only ReLU"),
        ("img_scale=(2049, 1025)", "img_scale=[(2048, 512), (9, 9)]", "[[2048, 512], [9, 9]]"),
        ("img_scale=(2049, 1025)", "img_scale=512", "at the size 512"),
    ],
)
def test_a_config_of_another_function_is_refused(tmp_path, old, new, words):
    config = mmseg_config()
    assert old in config
    with fails_naming(words):
        read_empty(tmp_path, meta(config.replace(old, new, 1)))


def test_what_a_new_config_does_not_ask_for_is_not_done(mmseg_state, tmp_path):
    config = mmseg_config(rest=PIPELINE_1).replace(
        "type='EncoderDecoder',", "type='EncoderDecoder', data_preprocessor=dict(size=(512, 512)),"
    )
    network = read_mmseg(save(mmseg_file(mmseg_state, config), tmp_path / "raw.pth")).network
    image = pixels((57, 49))
    theirs = run_mmseg(mmseg_state, image.flip(1).double(), corners=False)  # BGR, 0..255
    network = network.double()
    assert_equal(outputs(network, network.normalise(image)), theirs, 1e-6)


def test_padding_to_multiples_is_kept(tmp_path):
    preprocessor = "data_preprocessor=dict(bgr_to_rgb=True, test_cfg=dict(size_divisor=32)),"
    config = mmseg_config(rest=PIPELINE_1).replace(
        "type='EncoderDecoder',", f"type='EncoderDecoder', {preprocessor}"
    )
    assert read_empty(tmp_path, meta(config)).network.inference.pad_multiple == 32
    written = write_and_read(Inference(pad_multiple=32), tmp_path / "theirs.pth")
    assert written.pad_multiple == 32
    assert write_and_read(Inference(), tmp_path / "theirs.pth", corners=False).pad_multiple == 8


@pytest.mark.parametrize(
    ("settings", "test"), [("size=(512, 512)", ""), ("size_divisor=32", SLIDE)]
)
def test_padding_that_is_not_possible_here_is_refused(settings, test, tmp_path):
    preprocessor = f"data_preprocessor=dict(bgr_to_rgb=True, test_cfg=dict({settings})),"
    config = (mmseg_config(True, test) if test else mmseg_config(rest=PIPELINE_1)).replace(
        "type='EncoderDecoder',", f"type='EncoderDecoder', {preprocessor}"
    )
    with fails_naming("pads images", settings.split("=")[0]):
        read_empty(tmp_path, meta(config))


def test_weights_that_are_not_finite_are_refused(mmseg_state, tmp_path):
    name = "decode_head.in_conv.bn.running_var"
    state = {**mmseg_state, name: mmseg_state[name] * torch.inf}
    with fails_naming("raw.pth", name, "not finite"):
        read_mmseg(save(mmseg_file(state, mmseg_config()), tmp_path / "raw.pth"))
    trained = read_mmseg(save(mmseg_file(mmseg_state, mmseg_config()), tmp_path / "good.pth"))
    trained.network.classifier.bias.data.fill_(torch.nan)
    with fails_naming("theirs.pth", "classifier.bias", "not finite"):
        write_mmseg(trained, tmp_path / "theirs.pth")


# The checkpoint that is written.


def test_target_needs_nothing_else(converted, mmseg_path):
    content = torch.load(converted, weights_only=True)
    assert content["global_step"] == 80000
    saved = content["hyper_parameters"]
    assert saved["inference"] == {**saved["inference"], "mode": "whole", "base_size": (96, 64)}
    assert saved["class_names"] == list(CLASSES)
    assert {name.split(".")[0] for name in content["state_dict"]} == {"network"}
    trained = read_trained(converted)
    assert trained.network.inference == read_mmseg(mmseg_path).network.inference
    assert trained.network.predict(pixels((40, 48))[0]).shape == (40, 48)


def test_trainer_validates_the_target(converted, tmp_path):
    module = SegmentationModule(
        ISANet(3, "resnet50c", form="reduced"), SegmentationLoss(), CLASSES, PALETTE
    )
    root = make_folder(tmp_path / "data", splits=("val",), count=1)
    data = SegmentationFolder(str(root), class_names=CLASSES, num_workers=0)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    (scores,) = trainer.validate(module, data, ckpt_path=str(converted), verbose=False)
    assert 0 <= scores["val/miou"] <= 1
    assert module.trained_steps == 80000
    weights = torch.load(converted, weights_only=True)["state_dict"]
    for name, value in module.network.state_dict().items():
        assert value.equal(weights[f"network.{name}"]), name


@pytest.mark.parametrize("layout", ["mmseg", "openseg"])
def test_command_line_needs_only_the_target(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    if layout == "mmseg":
        trained = read_empty(tmp_path, meta(mmseg_config().replace("(2049, 1025)", "(64, 48)")))
    else:
        state = empty_state(openseg_layout(num_classes=19))
        trained = read_openseg_content(tmp_path, state)
    write_checkpoint(trained, tmp_path / "ours.ckpt")
    images = make_folder(tmp_path / "data", splits=("val",), count=1) / "val" / "images"
    options = {"--data.predict_dir": images, "--output": tmp_path / "out", "--runs_dir": tmp_path}
    options |= {"--ckpt_path": tmp_path / "ours.ckpt", "--trainer.accelerator": "cpu"}
    main(["predict", *(str(part) for option in options.items() for part in option)])
    assert (tmp_path / "out" / "masks" / "scene0.png").is_file()


# openseg.pytorch.

OPENSEG_CONFIG = {
    "dataset": "cityscapes",
    "iters": 40000,
    "data": {"input_mode": "BGR", "num_classes": 19},
    "network": {"stride": 8, "multi_grid": [1, 1, 1], "factors": [[8, 8]]},
    "normalize": {
        "div_value": 1.0,
        "mean_value": [103, 116, 123],
        "mean": [102.9801, 115.9465, 122.7717],
        "std": [1.0, 1.0, 1.0],
    },
}


@pytest.mark.parametrize(
    ("depth", "inplace", "bias", "prefix", "factors", "size"),
    [
        (101, True, False, "module.", (8,), (72, 88)),
        (50, True, True, "", (8,), (57, 49)),
        (50, False, True, "module.", (8, 4), (72, 88)),
    ],
    ids=["InPlaceABN", "InPlaceABN, biases", "BatchNorm, biases, two factors"],
)
def test_openseg_outputs_are_equal(depth, inplace, bias, prefix, factors, size, tmp_path):
    state = random_state(openseg_layout(depth, 19, inplace, bias, len(factors)))
    content = {"state_dict": {prefix + name: value for name, value in state.items()}}
    options = {"data_set": "cityscapes"}
    if len(factors) > 1:
        network = {**OPENSEG_CONFIG["network"], "factors": [[f, f] for f in factors]}
        content["config_dict"] = {**OPENSEG_CONFIG, "network": network}
        options = {}
    path = save(content, tmp_path / "theirs.pth")
    write_checkpoint(read_openseg(path, **options), tmp_path / "ours.ckpt")

    network = ISANet.from_checkpoint(tmp_path / "ours.ckpt").double()
    assert network.arguments["backbone"] == f"resnet{depth}s"
    image = pixels(size)
    theirs = run_openseg(state, image, inplace, factors)
    # Scales and means are rounded to float32 in the conversion.
    assert_equal(outputs(network, network.normalise(image)), theirs, 1e-6)


@pytest.fixture
def openseg_state():
    return empty_state(openseg_layout(num_classes=19))


def read_openseg_content(tmp_path, state, config=OPENSEG_CONFIG, **options):
    content = {"config_dict": config, "state_dict": state}
    return read_openseg(save(content, tmp_path / "theirs.pth"), **options)


def test_openseg_config_is_understood(openseg_state, tmp_path):
    trained = read_openseg_content(tmp_path, openseg_state)
    assert tuple(trained.classes.names) == Cityscapes.class_names
    assert trained.steps == 40000
    assert trained.network.inference == WHOLE
    arguments = trained.network.arguments
    assert arguments["mean"] == (122.7717, 115.9465, 102.9801)
    assert arguments["std"] == (1, 1, 1)
    assert arguments["align_corners"] is True
    assert arguments["dropout"] == 0.05
    assert trained.network.mean.flatten()[0].item() == pytest.approx(122.7717)


def test_openseg_rgb_model_in_units_is_understood(tmp_path):
    state = random_state(openseg_layout(num_classes=19))
    pixels = {"div_value": 255.0, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    config = {**OPENSEG_CONFIG, "data": {"input_mode": "RGB"}, "normalize": pixels}
    config["network"] = {"multi_grid": (1, 1, 1)}
    network = read_openseg_content(tmp_path, state, config).network
    assert network.arguments["mean"] == pytest.approx((127.5, 102, 76.5))
    assert network.arguments["std"] == pytest.approx((51, 51, 25.5))
    first = network.backbone.net.get_parameter("conv1.0.weight")
    assert first.equal(state["backbone.resinit.conv1.weight"])


@pytest.mark.parametrize(("key", "value"), [("stride", 16), ("multi_grid", [1, 2, 4])])
def test_openseg_backbone_of_another_kind_is_refused(key, value, openseg_state, tmp_path):
    config = {"network": {key: value}}
    with fails_naming("theirs.pth", key, value, "can be converted"):
        read_openseg_content(tmp_path, openseg_state, config, data_set="cityscapes")


def test_openseg_without_config_needs_a_data_set(openseg_state, tmp_path):
    with fails_naming("theirs.pth", "does not name its classes", "--data-set"):
        read_openseg_content(tmp_path, openseg_state, None)


def test_openseg_has_no_equal_in_mmseg(openseg_state, tmp_path):
    trained = read_openseg_content(tmp_path, openseg_state)
    with fails_naming("negative_slope is 0.01", "ceil_mode is True"):
        write_mmseg(trained, tmp_path / "no.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"isa_head.0.bias": (256,)}, ["1 left over: isa_head.0.bias"]),
        ({"isa_head.2.stages.1.long_range_sa.f_value.weight": (512, 512, 1, 1)}, ["left over"]),
        ({"isa_head.1.running_mean": None}, ["1 missing: isa_head.1.running_mean"]),
        ({"isa_head.1.weight": None}, ["missing: isa_head.1.0.weight"]),
    ],
)
def test_openseg_file_that_does_not_fit_is_refused(change, words, openseg_state, tmp_path):
    state = altered(openseg_state, change)
    with fails_naming("theirs.pth", *words):
        read_openseg_content(tmp_path, state)


# Refused.


def altered(state, change):
    """Returns a state dict with some shapes changed, added or, as None, taken away."""
    new = {name: torch.zeros(()).expand(shape) for name, shape in change.items() if shape}
    return {
        name: value for name, value in (state | new).items() if change.get(name, ()) is not None
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decode_head.in_conv.bn.bias": None}, ["1 missing: decode_head.in_conv.bn.bias"]),
        ({"decode_head.conv_seg.weight": None}, ["decode_head.conv_seg.weight", "not there"]),
        ({"decode_head.conv_seg.weight": (3,)}, ["decode_head.conv_seg.weight", "(3,)"]),
        ({"extra.weight": (2,)}, ["1 left over: extra.weight"]),
        ({"auxiliary_head.convs.0.conv.weight": None}, ["7 left over: auxiliary_head"]),
        (
            {"decode_head.out_conv.conv.weight": (512, 512, 1, 1), "b": (1,), "a": (1,)},
            ["2 left over: a, b", "1 of another shape", "(512, 512, 1, 1) for (512, 1024, 1, 1)"],
        ),
        ({"backbone.layer3.6.conv1.weight": (256, 1024, 1, 1)}, ["7 blocks", "stem of 32"]),
        ({"backbone.stem.0.weight": (16, 3, 3, 3)}, ["6 blocks", "stem of 16", "resnet101s"]),
        ({"backbone.layer3.3.conv1.weight": None}, ["missing: backbone.layer3.3.conv1.weight"]),
    ],
)
def test_file_that_does_not_fit_is_refused(change, words, tmp_path):
    state = altered(empty_state(mmseg_layout()), change)
    path = save(mmseg_file(state), tmp_path / "isanet_512x512.pth")
    with fails_naming("isanet_512x512.pth", *words):
        read_mmseg(path)


def test_long_lists_are_cut(tmp_path):
    state = empty_state(mmseg_layout()) | {f"x{i:02}": torch.zeros(()) for i in range(30)}
    with fails_naming("30 left over: x00, x01", "x19 and 10 more") as caught:
        read_mmseg(save(mmseg_file(state), tmp_path / "isanet_512x512.pth"))
    assert "x20" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        [1, 2],
        {"state_dict": {}},
        {"state_dict": {"a": 1}},
        {"state_dict": [torch.zeros(1)]},
        torch.zeros(3),
        {"state_dict": {1: torch.zeros(1)}},
    ],
)
def test_content_that_is_no_state_dict_is_refused(content, tmp_path):
    with fails_naming("isanet_512x512.pth", "state_dict"):
        read_mmseg(save(content, tmp_path / "isanet_512x512.pth"))


def test_other_network_is_refused(tmp_path):
    state = nn.Conv2d(3, 3, 3).state_dict()
    for read, key in ((read_mmseg, "backbone.stem.0.weight"), (read_openseg, "backbone.resinit")):
        with fails_naming("isanet_512x512.pth", "no ISANet in this layout", key):
            read(save({"state_dict": state}, tmp_path / "isanet_512x512.pth"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_refused(zipped, share, tmp_path):
    path = tmp_path / "cut_512x512.pth"
    torch.save({"state_dict": {"a": torch.rand(1000)}}, path, _use_new_zipfile_serialization=zipped)
    truncate(path, share)
    with fails_naming("cut_512x512.pth", "not a checkpoint of PyTorch, or is truncated"):
        read_mmseg(path)


def test_missing_and_other_files_are_refused(tmp_path):
    with fails_naming("checkpoint not found", "nowhere.pth"):
        read_mmseg(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no checkpoint at all")
    with fails_naming("text.pth", "not a checkpoint of PyTorch"):
        read_openseg(tmp_path / "text.pth")
    with fails_naming("text.pth", "checkpoint of isanet-pl"):
        read_trained(tmp_path / "text.pth")
    torch.jit.script(nn.ReLU()).save(tmp_path / "script.pth")
    with fails_naming("script.pth", "not a checkpoint of PyTorch"):
        read_mmseg(tmp_path / "script.pth")


# Files with more than tensors.


class History(dict):
    """A class of some framework, with all that can be pickled about one."""

    def __init__(self, values):
        self["values"] = np.asarray(values)
        self.scale = np.float64(3.5)
        self.method = History.mean

    def mean(self):
        return self["values"].mean()


class Listing(list):
    pass


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


@both_formats
def test_objects_of_other_classes_are_left_out(zipped, tmp_path, caplog):
    state = OrderedDict(empty_state(mmseg_layout()))
    state["backbone.stem.1.bias"] = torch.arange(32.0)
    state["backbone.stem.1.weight"] = nn.Parameter(torch.arange(32.0) / 7)
    content = mmseg_file(state, mmseg_config(), hook=History([1, 2]), more=Listing([History([3])]))
    content["message_hub"] = {"loss": History([1.5]), "seen": {Path("a"), 3}, "time": np.int64(3)}
    path = tmp_path / "theirs.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert isinstance(torch.load(path, weights_only=False)["meta"]["hook"], History)
    trained = read_mmseg(path)
    assert trained.network.backbone.net.get_parameter("conv1.1.bias").equal(torch.arange(32.0))
    assert trained.network.backbone.net.get_parameter("conv1.1.weight")[-1] == 31 / 7
    assert list(trained.classes.names) == list(CLASSES)
    assert "test_convert.History" in caplog.text
    assert "numpy" in caplog.text


@both_formats
def test_code_in_a_file_is_not_executed(zipped, tmp_path, caplog):
    path, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    content = mmseg_file(empty_state(mmseg_layout()), mmseg_config(), hook=Trap(sprung))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read_mmseg(path)
    assert not sprung.exists()
    assert "os.makedirs" in caplog.text

    content["state_dict"]["backbone.stem.1.bias"] = Trap(sprung)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with fails_naming("trap.pth", "backbone.stem.1.bias", "is no tensor"):
        read_mmseg(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap does work


def test_code_in_the_place_of_the_file_is_not_executed(tmp_path):
    path, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    for content in (Trap(sprung), {"state_dict": Trap(sprung)}):
        path.write_bytes(pickle.dumps(content))
        with fails_naming("trap.pth"):
            read_mmseg(path)
        save(content, path)
        with fails_naming("trap.pth", "state_dict"):
            read_openseg(path)
        assert not sprung.exists()


def test_getattr_is_replaced_as_well(tmp_path):
    # What it would find on a harmless class is not harmless, such as __subclasses__.
    code = b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x05\0\0\0clear\x86R."
    buffer = io.BytesIO()
    torch.save({"state_dict": 1}, buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "theirs.pth"
    whole = buffer.getvalue()
    body = pickle.dumps({"state_dict": 1}, 2)
    assert body in whole
    path.write_bytes(whole.replace(body, code))
    with fails_naming("theirs.pth", "state_dict"):
        read_mmseg(path)


# The activation.


def test_slope_is_of_every_activation_of_the_head_and_of_none_of_the_backbone():
    for form in ("direct", "reduced"):
        with torch.device("meta"):
            network = ISANet(3, "resnet18", form=form, negative_slope=0.01, aux_head=True)
            plain = ISANet(3, "resnet18", form=form, aux_head=True)
        kinds = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.ReLU | nn.LeakyReLU)
        }
        head = [module for name, module in kinds.items() if not name.startswith("backbone")]
        assert len(head) > 10
        assert all(isinstance(m, nn.LeakyReLU) and m.negative_slope == 0.01 for m in head)
        assert all(isinstance(m, nn.ReLU) for n, m in kinds.items() if n.startswith("backbone"))
        assert not any(isinstance(module, nn.LeakyReLU) for module in plain.modules())
        assert network.state_dict().keys() == plain.state_dict().keys()


# The script.


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the script in this process; returns what it printed."""

    def run(*arguments):
        script = Path(__file__).parent.parent / "scripts" / "convert_checkpoint.py"
        monkeypatch.setattr(sys, "argv", [script.name, *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_script_converts_there_and_back(convert, mmseg_path, mmseg_state, tmp_path):
    ours, back = tmp_path / "new" / "ours.ckpt", tmp_path / "back.pth"
    said = convert("mmseg", mmseg_path, ours)
    assert said.startswith(
        f"{ours}: resnet50c, 3 classes (wood, stone, water), align_corners False"
    )
    convert("isanet-pl", ours, back, "--to", "mmseg")
    back = torch.load(back, weights_only=True)["state_dict"]
    assert all(value.equal(mmseg_state[name]) for name, value in back.items())


def test_script_passes_its_options_on(convert, tmp_path):
    source = save({"state_dict": empty_state(openseg_layout(num_classes=19))}, tmp_path / "a.pth")
    options = ("--data-set", "cityscapes", "--align-corners", "false")
    said = convert("openseg", source, tmp_path / "b.ckpt", *options)
    assert "resnet50s, 19 classes (cityscapes), align_corners False, whole images" in said


def test_script_refuses_options_that_have_no_use(convert, mmseg_path, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert("isanet-pl", mmseg_path, tmp_path / "a.pth", "--data-set", "voc")
    assert "for files that do not say so themselves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["openseg", "{source}", "{target}"], r"no ISANet in this layout"),
        (["mmseg", "{source}", "{source}"], r"overwrite"),
        (["mmseg", "nowhere.pth", "{target}"], r"checkpoint not found: nowhere\.pth"),
        (["isanet-pl", "{source}", "{target}"], r"checkpoint of isanet-pl"),
    ],
)
def test_script_says_what_is_wrong(arguments, message, convert, mmseg_path, tmp_path):
    before = mmseg_path.stat()
    names = {"source": mmseg_path, "target": tmp_path / "ours.ckpt"}
    with pytest.raises(SystemExit, match=r"convert_checkpoint\.py: error: .*" + message):
        convert(*(argument.format(**names) for argument in arguments))
    assert not (tmp_path / "ours.ckpt").exists()
    assert mmseg_path.stat().st_mtime_ns == before.st_mtime_ns
