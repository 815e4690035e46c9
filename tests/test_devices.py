"""Two processes on one machine, as users start them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_folder
from PIL import Image
from test_predictions import write_checkpoint

NAMES = "[sky, road, car]"


def run(*args, cwd):
    command = [sys.executable, "-m", "isanet_pl", *map(str, args)]
    fixed = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.num_workers", "0"]
    return subprocess.run([*command, *fixed], capture_output=True, text=True, cwd=cwd, timeout=180)


@pytest.fixture
def config(tmp_path):
    make_folder(tmp_path / "data", size=(32, 48), count=5)
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
model:
  network:
    {{backbone: resnet18, last_stage: 1, key_channels: 4, value_channels: 4, out_channels: 4}}
  loss: {{}}
  reference_batch_size: 2
data:
  class_path: SegmentationFolder
  init_args: {{root: {tmp_path / "data"}, class_names: {NAMES}, batch_size: 2, crop_size: [32, 32]}}
trainer: {{max_steps: 2, val_check_interval: 1, check_val_every_n_epoch: null}}
"""
    )
    return path


def labelled_pixels(path):
    with Image.open(path) as mask:
        return np.count_nonzero(np.array(mask) != 255)


def test_fit_ends_with_its_table_and_files(config, tmp_path):
    # With W&B, of which only the first process may know.
    done = run("fit", "--config", config, "--wandb", "offline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mIoU" in done.stdout
    assert "a step sees 4 images (2 devices x batch_size 2" in done.stderr
    folder = tmp_path / "runs" / "tiny" / "version_0"
    assert json.loads((folder / "results.json").read_text())["step"] == 2
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert len(list((folder / "panels").iterdir())) == 2
    # One confusion matrix of both processes: 5 images, and the one that evens out their shares.
    counts = np.loadtxt(folder / "confusion_val.csv", delimiter=",", skiprows=1)
    assert counts.sum() == 6 * labelled_pixels(tmp_path / "data" / "val" / "masks" / "scene0.png")
    with Image.open(folder / "confusion_val.png"), Image.open(folder / "iou_val.png"):
        pass
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]


def test_validate_and_predict(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "a.ckpt")
    make_folder(tmp_path / "data", size=(32, 48), count=5)
    data = ("--data", "SegmentationFolder", "--data.root", tmp_path / "data")
    data += ("--data.class_names", NAMES)
    done = run("validate", "--ckpt_path", checkpoint, *data, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "a" / "version_0" / "results.json").is_file()

    photos = tmp_path / "data" / "test" / "images"
    (photos / "broken.png").write_text("no image")
    for output in (("--output", tmp_path / "out"), ()):
        options = ("--data.predict_dir", photos, *output)
        done = run("predict", "--ckpt_path", checkpoint, *options, cwd=tmp_path)
        assert done.returncode != 0
        assert "1 images could not be segmented" in done.stderr
        assert "Traceback" not in done.stderr
        assert "5 images done" in done.stdout
        runs = tmp_path / "runs" / "a"
        folder = tmp_path / "out" if output else next(runs.glob("*/predictions"))
        masks = sorted(path.name for path in (folder / "masks").iterdir())
        assert masks == [f"scene{i}.png" for i in range(5)]
        with Image.open(folder / "masks" / "scene4.png") as mask:
            assert mask.size == (48, 32)
