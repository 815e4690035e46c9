"""Every config parses, builds, and takes a training and a validation step."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_camvid, make_folder
from foreign_nets import openseg_layout
from layouts import (
    make_ade20k,
    make_cityscapes,
    make_coco10k,
    make_context,
    make_lip,
    make_voc,
)

from isanet_pl.cli import main
from isanet_pl.convert.layout import rename
from isanet_pl.convert.openseg import INPLACE_ABN_SLOPE, NETWORK, rules_of
from isanet_pl.data import SegmentationDataModule
from isanet_pl.losses import SegmentationLoss
from isanet_pl.models import ISANet
from isanet_pl.models.backbone import timm
from isanet_pl.module import SegmentationModule

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
RECIPES = [path for path in CONFIGS if re.match(r"isanet(-direct|-openseg)?_r", path.name)]
MMSEG = [path for path in RECIPES if path.name.startswith("isanet_")]
AUTHORS = [path for path in RECIPES if path.name.startswith("isanet-openseg_")]
OTHERS = [path for path in CONFIGS if path not in RECIPES]

# What makes a step small; none of it changes which classes are built.
SMALL = {
    "--data.batch_size": 2,
    "--data.num_workers": 0,
    "--model.network.pretrained": "false",
    "--trainer.accelerator": "cpu",
    "--trainer.precision": "32-true",
    "--trainer.fast_dev_run": 1,
}

# Settings of section 1.2 in mmsegmentation's configs/isanet: devices x batch, image and crop size.
PUBLISHED = {
    "cityscapes-512x1024": (2, "Cityscapes", [2048, 1024], [512, 1024]),
    "cityscapes-769x769": (2, "Cityscapes", [2049, 1025], [769, 769]),
    "ade20k-512x512": (4, "ADE20K", [2048, 512], [512, 512]),
    "voc12aug-512x512": (4, "VOC", [2048, 512], [512, 512]),
}
# Of openseg.pytorch's configs and scripts for ISANet, which have no scores.
UNPUBLISHED = {
    "pascal-context-59-520x520": (4, "PascalContext", [4096, 520], [520, 520]),
    "coco-stuff10k-520x520": (4, "COCOStuff10k", [4096, 520], [520, 520]),
    "lip-473x473": (8, "LIP", [473, 473], [473, 473]),
}
MAKERS = {
    "ADE20K": make_ade20k,
    "COCOStuff10k": make_coco10k,
    "Cityscapes": make_cityscapes,
    "LIP": make_lip,
    "PascalContext": make_context,
    "VOC": make_voc,
}


def read(path):
    """Returns a config with the files that it refers to."""

    def resolve(node, folder):
        if isinstance(node, str) and node.endswith(".yaml"):
            return resolve(yaml.safe_load((folder / node).read_text()), (folder / node).parent)
        if isinstance(node, dict):
            return {key: resolve(value, folder) for key, value in node.items()}
        return node

    return resolve(yaml.safe_load(path.read_text()), path.parent)


def take_a_step(path, tmp_path, monkeypatch, **options):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    config = read(path)
    name = config["data"]["class_path"]
    options = {**SMALL, **options}
    if name in ("CamVid", "SegmentationFolder"):
        make = make_camvid if name == "CamVid" else make_folder
        options["--data.root"] = make(tmp_path / "data", size=(40, 48))
    if name == "SegmentationFolder":
        options["--data.class_names"] = "[a, b, c]"
    if name != "Synthetic":
        options["--data.crop_size"] = "[40, 48]"
    if path in RECIPES:
        options["--data.root"] = MAKERS[name](tmp_path / "data")
        options["--data.base_size"] = "[48, 40]"
    if "inference" in config["model"]:
        options["--model.inference.crop_size"] = "[32, 32]"
        options["--model.inference.stride"] = "[20, 20]"
    arguments = [str(part) for pair in options.items() for part in pair]
    cli = main(["fit", "--config", str(path), *arguments])
    assert cli.trainer.global_step == 1
    assert "val/miou" in cli.trainer.callback_metrics
    return cli


@pytest.mark.parametrize("form", ["direct", "reduced"])
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_config_takes_a_step_in_both_forms(path, form, tmp_path, monkeypatch):
    take_a_step(path, tmp_path, monkeypatch, **{"--model.network.form": form})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step(path, tmp_path, monkeypatch):
    cli = take_a_step(path, tmp_path, monkeypatch)
    inference = cli.model.inference
    assert inference.base_size == (48, 40)  # flows from the data
    assert inference.mode == ("slide" if "769" in path.stem else "whole")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_it_is_run(path):
    header = path.read_text().split("model:")[0]
    assert f"isanet-pl fit --config configs/{path.name}" in header


def test_every_published_setting_has_a_recipe():
    names = {path.stem for path in RECIPES}
    expected = {
        f"isanet_r{depth}-d8_4xb{batch}-{steps}_{data}"
        for depth in (50, 101)
        for data, (batch, *_) in PUBLISHED.items()
        for steps in {"c": ("40k", "80k"), "a": ("80k", "160k"), "v": ("20k", "40k")}[data[0]]
    }
    assert len(expected) == 16
    assert expected <= names
    for data in ("cityscapes", "ade20k", "voc12aug"):
        assert any(name.startswith("isanet-direct_r50") and data in name for name in names)
    assert len(AUTHORS) == len(UNPUBLISHED) + 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_what_its_name_says(path):
    form, depth, batch, steps, data = re.fullmatch(
        r"isanet(-direct|-openseg)?_r(\d+)-d8_4xb(\d)-(\d+)k_([\w-]+)", path.stem
    ).groups()
    config = read(path)
    published_batch, class_path, base_size, crop_size = (PUBLISHED | UNPUBLISHED)[data]
    network, trainer = config["model"]["network"], config["trainer"]
    assert network["form"] == ("direct" if form == "-direct" else "reduced")
    stem = {None: "c", "-direct": "", "-openseg": "s"}[form]
    assert network["backbone"] == f"resnet{depth}{stem}"
    assert network["pretrained"] is True
    assert int(batch) == published_batch == config["data"]["init_args"]["batch_size"]
    assert config["model"]["reference_batch_size"] == 4 * published_batch
    assert config["data"]["class_path"] == class_path
    assert config["data"]["init_args"]["base_size"] == base_size
    assert config["data"]["init_args"]["crop_size"] == crop_size
    assert trainer["max_steps"] == 1000 * int(steps)
    assert trainer["val_check_interval"] == 100 * int(steps)
    sliding = "769" in data
    assert network.get("align_corners", False) is (sliding or form == "-openseg")
    slide = {"mode": "slide", "crop_size": [769, 769], "stride": [513, 513]}
    assert config["model"].get("inference") == (slide if sliding else None)


@pytest.mark.parametrize("path", MMSEG, ids=lambda path: path.stem)
def test_published_setting_leaves_all_else_at_its_default(path):
    config = read(path)
    sliding = "769" in path.stem
    model, network = config["model"], config["model"]["network"]
    assert config.keys() == {"model", "data", "trainer", "last_checkpoint"}
    assert config["last_checkpoint"].keys() == {"every_n_steps"}
    assert model.keys() - {"inference"} == {"network", "loss", "reference_batch_size"}
    assert network.keys() - {"align_corners"} == {"form", "backbone", "pretrained"}
    assert ("inference" in model) == ("align_corners" in network) == sliding
    assert model["loss"] == {}
    assert config["data"]["init_args"].keys() == {"batch_size", "crop_size", "base_size"}
    assert config["trainer"].keys() == {
        *("max_steps", "val_check_interval", "check_val_every_n_epoch"),
        *("precision", "sync_batchnorm"),
    }


def test_defaults_are_those_of_the_published_settings():
    """Of mmsegmentation's configs/_base_ and configs/isanet; see also `test_module.py` for SGD."""

    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    module, loss = defaults(SegmentationModule), defaults(SegmentationLoss)
    data, network = defaults(SegmentationDataModule), defaults(ISANet)
    assert (module["poly_power"], module["end_lr_factor"]) == (0.9, 1e-4 / 0.01)
    assert (module["warmup_fraction"], module["new_layers_lr_factor"]) == (0.0, 1.0)
    assert (loss["aux_weight"], loss["class_weights"], loss["ohem_threshold"]) == (0.4, None, None)
    assert (data["scale_range"], data["cat_max_ratio"]) == ((0.5, 2.0), 0.75)
    assert data["flip"] is data["photometric"] is True
    assert (network["output_stride"], network["aux_channels"]) == (8, 256)
    with torch.device("meta"):
        reduced = ISANet(19, "resnet18", form="reduced").arguments
    assert (reduced["dropout"], reduced["aux_head"]) == (0.1, True)


@pytest.mark.parametrize("path", AUTHORS, ids=lambda path: path.stem)
def test_the_authors_schedule_ends_at_zero(path):
    model = read(path)["model"]
    assert (model["end_lr_factor"], model["network"]["dropout"]) == (0.0, 0.05)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short_and_says_what_is_published(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 25
    header = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert "4 GPUs" in header
    published = not any(data in path.stem for data in UNPUBLISHED)
    assert bool(re.search(r"Published: .*\d\d\.\d+ mIoU", header)) == published
    assert published or re.search(r"publish no score|No score is published", header)
    of_mmseg = path.stem.startswith("isanet_")
    assert ("mmsegmentation took" in header) == of_mmseg
    assert not of_mmseg or re.search(r"took \d+\.\d+ GB on each V100", header)


def test_timm_has_weights_for_the_backbones_of_all_configs():
    backbones = {read(path)["model"]["network"].get("backbone", "resnet50") for path in CONFIGS}
    assert len(backbones) > 3
    for name in backbones:
        assert timm.get_pretrained_cfg(name).has_weights


@pytest.mark.parametrize("path", AUTHORS, ids=lambda path: path.stem)
def test_authors_recipe_builds_the_network_of_their_checkpoints(path):
    config = read(path)
    network = config["model"]["network"]
    assert network.items() >= NETWORK.items()
    weights = config["model"].get("loss", {}).get("class_weights", ())
    assert len(weights) == (19 if "cityscapes" in path.stem else 0)
    assert network["negative_slope"] == INPLACE_ABN_SLOPE
    with torch.device("meta"):
        own = ISANet(19, **{**network, "pretrained": False}).state_dict()
    rules = rules_of(inplace_abn=False)
    shapes = {rename(name, rules): tuple(tensor.shape) for name, tensor in own.items()}
    assert shapes == dict(openseg_layout(depth=101, num_classes=19, inplace=False))
