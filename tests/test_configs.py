"""Every config parses, builds, and takes a training and a validation step."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_camvid, make_folder

from isanet_pl.cli import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

# What makes a step small; none of it changes which classes are built.
SMALL = {
    "--data.batch_size": 2,
    "--data.num_workers": 0,
    "--model.network.pretrained": "false",
    "--trainer.accelerator": "cpu",
    "--trainer.precision": "32-true",
    "--trainer.fast_dev_run": 1,
}


@pytest.mark.parametrize("form", ["direct", "reduced"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_takes_a_step_in_both_forms(path, form, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    options = {**SMALL, "--model.network.form": form}
    data = yaml.safe_load(path.read_text())["data"]
    if isinstance(data, str):
        data = yaml.safe_load((path.parent / data).read_text())
    if data["class_path"] == "CamVid":
        options["--data.root"] = make_camvid(tmp_path / "camvid", size=(40, 48))
    elif data["class_path"] == "SegmentationFolder":
        options["--data.root"] = make_folder(tmp_path / "folder", size=(40, 48))
        options["--data.class_names"] = "[a, b, c]"
    if data["class_path"] != "Synthetic":
        options["--data.crop_size"] = "[40, 48]"
    arguments = [str(part) for pair in options.items() for part in pair]
    cli = main(["fit", "--config", str(path), *arguments])
    assert cli.trainer.global_step == 1
    assert "val/miou" in cli.trainer.callback_metrics


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_how_it_is_run(path):
    header = path.read_text().split("model:")[0]
    assert f"isanet-pl fit --config configs/{path.name}" in header
