"""Two processes on one machine, as users start them: what they compute, and how they end.

What they are compared with runs in the process of the test.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails_naming, make_folder
from PIL import Image
from test_predictions import write_checkpoint

from isanet_pl.callbacks.ranks import watch
from isanet_pl.checkpoint_io import read_checkpoint
from isanet_pl.cli import main
from isanet_pl.data import SegmentationFolder
from isanet_pl.models import ISANet

NAMES = "[sky, road, car]"
STEPS = 20
WITHIN = 60
"""Seconds within which a run must end once one of its processes has died."""
CONFIG = f"""
model:
  network:
    backbone: resnet18
    last_stage: 1
    key_channels: 4
    value_channels: 4
    out_channels: 4
    dropout: 0.0
    aux_head: true
    aux_channels: 4
  loss: {{class_weights: [1.0, 2.0, 0.5]}}
  freeze_bn: true
data:
  class_path: SegmentationFolder
  init_args: {{root: ROOT, class_names: {NAMES}, crop_size: [32, 32], num_workers: 0}}
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  val_check_interval: 10
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  gradient_clip_val: 0.5
last_checkpoint: {{every_n_steps: 1}}
ema_decay: 0.9
"""


def command(*args):
    fixed = ("--trainer.accelerator", "cpu", "--trainer.devices", "2")
    return [sys.executable, "-m", "isanet_pl", *map(str, args), *fixed]


def run(*args, cwd):
    done = command(*args, "--data.num_workers", "0")
    return subprocess.run(done, capture_output=True, text=True, cwd=cwd, timeout=180)


def fit_alone(folder, name, *args):
    """Returns the run folder of a training in this process; a step sees 4 images, as with two."""
    options = ("--config", "tiny.yaml", "--name", name, "--data.batch_size", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["isanet-pl"])
        main(["fit", *map(str, (*options, *args)), "--trainer.devices", "1"])
    return folder / "runs" / name / "version_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a config, whose data has void pixels and 7 images in each split."""
    folder = tmp_path_factory.mktemp("devices")
    data = make_folder(folder / "data", size=(40, 56), count=7)
    (folder / "tiny.yaml").write_text(CONFIG.replace("ROOT", str(data)))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Returns the run folder of one process."""
    return fit_alone(folder, "alone")


def logged(run_folder, name):
    with (run_folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def assert_same_pixels(run_folder, other):
    """Two runs counted as many pixels of each class, and took all but a few for the same ones."""
    one, two = (
        np.loadtxt(folder / "confusion_val.csv", delimiter=",", skiprows=1, dtype=int)
        for folder in (run_folder, other)
    )
    assert one.sum(1).tolist() == two.sum(1).tolist()
    assert abs(one - two).sum() <= 8


def assert_same_weights(run_folder, other):
    ours, theirs = (
        read_checkpoint(path / "checkpoints" / "last.ckpt") for path in (run_folder, other)
    )
    assert ours["global_step"] == theirs["global_step"] >= STEPS
    for weights in ("state_dict", "current_model_state"):  # the averages, and what is trained
        for name, tensor in theirs[weights].items():
            assert torch.allclose(ours[weights][name], tensor, rtol=0, atol=1e-5), (weights, name)
    trained = ours["current_model_state"]
    assert any(not torch.equal(trained[k], tensor) for k, tensor in ours["state_dict"].items())


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(folder, alone):
    # With W&B, of which only the first process may know.
    options = ("--config", "tiny.yaml", "--name", "pair", "--data.batch_size", 2)
    options += ("--wandb", "offline", "--model.reference_batch_size", 2)
    done = run("fit", *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    pair = folder / "runs" / "pair" / "version_0"
    assert "mIoU" in done.stdout
    assert "a step sees 4 images (2 devices x batch_size 2" in done.stderr
    assert_same_weights(pair, alone)
    assert max(logged(alone, "train/grad_norm").values()) > 0.5  # clipping matters
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/miou"):
        one, two = logged(alone, name), logged(pair, name)
        assert len(one) >= 2
        tolerance = 1e-3 if name == "val/miou" else 1e-5  # rounding may change a pixel's class
        assert two == pytest.approx(one, abs=tolerance), name
    assert_same_pixels(pair, alone)  # 7 images in two shares, none of them twice
    assert json.loads((pair / "results.json").read_text())["step"] == STEPS
    assert len(list((pair / "panels").iterdir())) == 2
    with Image.open(pair / "confusion_val.png"), Image.open(pair / "iou_val.png"):
        pass
    assert len(list(pair.glob("wandb/offline-run-*"))) == 1
    assert [path.name for path in pair.parent.iterdir()] == ["version_0"]


@pytest.mark.slow
def test_two_processes_start_a_run_from_a_checkpoint_of_another_of_its_name(folder, alone):
    options = ("--ckpt_path", alone / "checkpoints" / "last.ckpt")
    options += ("--trainer.max_steps", STEPS + 10)
    own = ("--config", "tiny.yaml", "--name", "alone", "--data.batch_size", 2)
    done = run("fit", *own, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    new = alone.parent / "version_1"
    assert_same_weights(new, fit_alone(folder, "onward", *options))
    assert json.loads((new / "results.json").read_text())["step"] == STEPS + 10
    assert (new / "checkpoints" / "best.ckpt").is_file()


def ranks_of(process):
    """Returns the two processes of a run by rank: the one that was started, and its other one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while True:
        for pid in map(int, children.read_text().split()):
            if is_rank(pid, 1):
                return [process.pid, pid]
        time.sleep(0.05)


def is_rank(pid, rank):
    """Returns whether a process was started as a rank; imports start others, for a moment."""
    try:
        return f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(
            b"\0"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_process_that_is_asked_to_stop_stops_the_other_at_the_same_step(asked, folder, tmp_path):
    options = ("--config", "tiny.yaml", "--name", f"asked{asked}", "--data.batch_size", 2)
    options += ("--trainer.max_steps", 100_000, "--trainer.val_check_interval", 10_000)
    last = folder / "runs" / f"asked{asked}" / "version_0" / "checkpoints" / "last.ckpt"
    with (tmp_path / "said").open("w") as said:
        started = command("fit", *options, "--last_checkpoint.every_n_steps", 7)
        process = subprocess.Popen(started, cwd=folder, stdout=said, stderr=said)
        pids = ranks_of(process)
        while not last.exists():
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        os.kill(pids[asked], signal.SIGTERM)
        assert process.wait(WITHIN) == 128 + signal.SIGTERM, (tmp_path / "said").read_text()
    step = read_checkpoint(last)["global_step"]
    assert step % 10 == 0 or step % 7 == 0  # where they talk to each other
    assert f"SIGTERM: stopped after step {step}," in (tmp_path / "said").read_text()
    since = time.monotonic()
    while any(map(is_running, pids)) and time.monotonic() - since < WITHIN:
        time.sleep(0.1)  # the other one ends by itself, perhaps a moment later
    assert not any(map(is_running, pids))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_run_which_goes_on_with_another_number(
    dies, folder, alone, tmp_path, caplog
):
    name = f"dies{dies}"
    options = ("--config", "tiny.yaml", "--name", name, "--data.batch_size", 2)
    with (tmp_path / "said").open("w") as said:
        started = command("fit", *options)
        process = subprocess.Popen(started, cwd=folder, stdout=said, stderr=said)
        pids = ranks_of(process)
        run_folder = folder / "runs" / name / "version_0"
        while not (run_folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        os.kill(pids[dies], signal.SIGKILL)
        since = time.monotonic()
        while any(map(is_running, pids)) and time.monotonic() - since < WITHIN:
            process.poll()
            time.sleep(0.1)
        assert not any(map(is_running, pids))
        code = process.wait(WITHIN)
    message = (tmp_path / "said").read_text()
    # Lightning kills the first process whenever it next looks and finds the other dead: perhaps
    # before it has said so. Where the first is the one that died, the other one says it.
    if dies == 0 or code != -signal.SIGKILL:
        assert "--resume true" in message
        assert re.search(
            f"rank {dies} (was killed|has died)|connection to another|cannot reach each other",
            message,
        )
    assert not (run_folder / "results.json").exists()

    caplog.set_level("INFO", "isanet_pl")
    assert fit_alone(folder, name, "--resume", "true") == run_folder
    assert "data.batch_size: 2 before, now 4" in caplog.text
    assert "trainer.devices: 2 before, now 1" in caplog.text
    assert_same_weights(run_folder, alone)
    assert_same_pixels(run_folder, alone)


def test_the_death_of_a_started_process_is_said(caplog):
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    children[1].kill()
    watch(children, None, lambda: False)
    children[0].kill()
    assert "rank 2 was killed by SIGKILL: the run ends; fit goes on" in caplog.text


def test_a_process_ends_without_the_one_that_started_it(tmp_path):
    # As on a GPU, where no collective operation notices.
    watched = """
import os
parent = os.getppid()
from isanet_pl.data import SegmentationFolder
from isanet_pl.callbacks.ranks import watch
print(os.getpid(), flush=True)
watch([], parent, lambda: False)
"""
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {watched!r}])"
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen(
            [sys.executable, "-c", starts], stdout=subprocess.PIPE, stderr=said
        )
        pid = int(first.stdout.readline())
        assert is_running(pid)
        first.kill()
        first.wait()
        since = time.monotonic()
        while is_running(pid):
            assert time.monotonic() - since < WITHIN
            time.sleep(0.1)
    assert "rank 0 has died: the run ends; fit goes on" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_fewer_images_than_devices_are_refused(stage, tmp_path):
    root = make_folder(tmp_path, count=1)
    options = {"class_names": ["sky", "road", "car"], "predict_dir": str(root / "test" / "images")}
    data = SegmentationFolder(root=str(root), batch_size=1, **options)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, limit_val_batches=1.0)
    with fails_naming("1 images, fewer than", "--trainer.devices 1"):
        data.setup(stage)


@pytest.mark.slow
def test_validate_and_predict(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    checkpoint = write_checkpoint(tmp_path / "a.ckpt")
    make_folder(tmp_path / "data", size=(32, 48), count=5)
    data = ("--data", "SegmentationFolder", "--data.root", tmp_path / "data")
    data += ("--data.class_names", NAMES)
    done = run("validate", "--ckpt_path", checkpoint, *data, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "runs" / "a" / "version_0" / "results.json").read_text())
    options = (*data, "--trainer.accelerator", "cpu", "--runs_dir", tmp_path / "alone")
    alone = main(["validate", "--ckpt_path", str(checkpoint), *map(str, options)])
    expected = {k: float(v) for k, v in alone.trainer.callback_metrics.items()}
    for name in ("miou", "macc", "aacc"):  # each image once: 5 are no multiple of 2 processes
        assert result["scores"][name] == pytest.approx(expected[f"val/{name}"], abs=1e-6)

    photos = tmp_path / "data" / "test" / "images"
    (photos / "broken.png").write_text("no image")
    options = ("--data.predict_dir", photos)
    done = run("predict", "--ckpt_path", checkpoint, *options, cwd=tmp_path)
    assert done.returncode != 0
    assert "1 image could not be segmented" in done.stderr
    assert "Traceback" not in done.stderr
    assert "5 images done" in done.stdout
    folder = next((tmp_path / "runs" / "a").glob("*/predictions"))
    masks = sorted(path.name for path in (folder / "masks").iterdir())
    assert masks == [f"scene{i}.png" for i in range(5)]
    network = ISANet.from_checkpoint(checkpoint)
    for name in masks:
        with Image.open(photos / name) as image, Image.open(folder / "masks" / name) as mask:
            assert np.array_equal(np.array(mask), network.predict(image).numpy())
    with Image.open(folder / "masks" / "scene4.png") as mask:
        assert mask.size == (48, 32)
