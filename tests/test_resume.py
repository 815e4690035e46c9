"""Runs that are stopped and go on: to the same end, from whatever moment, with nothing lost."""

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails_naming, truncate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_broken_input import full_disk
from test_module import make_module

from isanet_pl.__main__ import run as run_program
from isanet_pl.callbacks.averaging import ExponentialAverage
from isanet_pl.callbacks.last_checkpoint import LastCheckpoint, random_state, restore_random_state
from isanet_pl.callbacks.progress import Progress
from isanet_pl.callbacks.results import ResultTable
from isanet_pl.callbacks.run_config import flatten
from isanet_pl.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from isanet_pl.cli import main
from isanet_pl.models import ISANet
from isanet_pl.module import SegmentationModule
from isanet_pl.resume import continue_metrics, find_run

SCRIPT = Path(__file__).parent.parent / "scripts" / "stress_resume.py"
CONFIG = """
model:
  network:
    backbone: resnet18
    last_stage: 1
    key_channels: 4
    value_channels: 4
    out_channels: 4
    down_factors: [[4, 4]]
    classify_before_upsampling: true
    dropout: 0.3
  loss: {}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  class_path: Synthetic
  init_args:
    {cells: 2, num_train: 10, num_eval: 2, batch_size: 2, eval_batch_size: 2, num_workers: 0}
trainer:
  max_steps: 8
  val_check_interval: 3
  check_val_every_n_epoch: null
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
panels: {num_images: 0}
last_checkpoint: {every_n_steps: 1}
"""
BY_EPOCHS = {
    "trainer.max_steps": -1,
    "trainer.max_epochs": 3,
    "trainer.val_check_interval": 1.0,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.accumulate_grad_batches": 2,
    "data.num_train": 14,
}


@pytest.fixture(autouse=True)
def no_process_arguments(monkeypatch):
    # LightningCLI warns when a process has arguments of its own besides the given ones.
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])


def arguments(folder, options):
    options = {"config": folder / "tiny.yaml", "runs_dir": folder / "runs", **options}
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def fit(folder, **options):
    """Runs a fit in this process and returns its run folder."""
    (folder / "tiny.yaml").write_text(CONFIG)
    return Path(main(["fit", *arguments(folder, options)]).trainer.log_dir)


def metrics(run):
    """Returns the lines of metrics.csv that do not depend on the clock, as (step, loss, mIoU)."""
    with (run / "metrics.csv").open() as file:
        rows = [
            (int(row["step"]), row["train/loss"], row.get("val/miou", ""))
            for row in csv.DictReader(file)
        ]
    return sorted(rows)


@pytest.fixture(scope="module", params=["iterations", "epochs"])
def whole(request, tmp_path_factory):
    """Returns folder, options and end of a run that is left alone, and all it kept on its way."""
    folder = tmp_path_factory.mktemp("whole")
    options = {"ema_decay": 0.9} if request.param == "iterations" else BY_EPOCHS
    kept, save = [], LastCheckpoint._save

    def save_and_keep(self, trainer):
        last = self._folder(trainer) / "last.ckpt"
        before = last.stat().st_ino if last.exists() else None
        save(self, trainer)
        if last.exists() and last.stat().st_ino != before:
            kept.append(folder / f"{len(kept)}.ckpt")
            shutil.copy(last, kept[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isanet-pl"])
        patch.setattr(LastCheckpoint, "_save", save_and_keep)
        run = fit(folder, **options)
    return folder, options, run, kept


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Returns the folder of a run of 4 steps, one of which was validated and is the best."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isanet-pl"])
        fit(folder, **{"trainer.max_steps": 4})
    return folder


@pytest.fixture
def stopped(half, tmp_path):
    """Returns a copy of the folder of `half`."""
    shutil.copytree(half, tmp_path / "stopped")
    return tmp_path / "stopped"


# The same end


# Every third step is validated. In iterations an epoch has 5 batches, and step 5 ends one; in
# epochs a step takes two batches, and the third ends one: what would be the seventh batch is left
# to the next epoch.
@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(whole, step, tmp_path, scripts_on_path):
    from stress_resume import COMPARED, differences

    _, options, run, kept = whole
    resumed = fit(tmp_path, ckpt_path=kept[step - 1], **options)
    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, resumed)]
    for name in COMPARED:
        parts = [end["callbacks"] if "." in name else end for end in ends]
        assert not list(differences(*(part.get(name.split(".")[-1]) for part in parts), name))
    # Steps are counted from 0 where a loss is logged, and from 1 where a validation is.
    assert metrics(resumed) == [
        row for row in metrics(run) if row[0] > step or (row[0] == step and row[1])
    ]


def test_every_step_was_kept_and_validated_ones_only_after_validation(whole):
    _, _, run, kept = whole
    steps = [read_checkpoint(path)["global_step"] for path in kept]
    assert steps == list(range(1, len(steps) + 1))
    validated = [step for step, _, miou in metrics(run) if miou]
    assert validated == list(range(3, len(steps) + 1, 3))
    for step in validated:
        state = read_checkpoint(kept[step - 1])["callbacks"]
        (best,) = (s for key, s in state.items() if key.startswith("ModelCheckpoint"))
        assert best["current_score"] is not None


def test_resume_goes_on_in_the_folder_of_the_run(stopped, capsys):
    before = metrics(stopped / "runs" / "tiny" / "version_0")
    run = fit(stopped, resume="true", **{"trainer.max_steps": 8})
    assert run == stopped / "runs" / "tiny" / "version_0"
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    rows = metrics(run)
    assert rows[: len(before)] == before
    assert [step for step, loss, _ in rows if loss] == list(range(8))
    assert [step for step, _, miou in rows if miou] == [3, 6]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 8
    saved = (run / "config.yaml").read_text()
    assert "max_steps: 8" in saved
    assert "ckpt_path: null" in saved  # it runs again as it stands


def test_the_same_command_starts_a_run_if_there_is_none(tmp_path):
    run = fit(tmp_path, resume="true", **{"trainer.max_steps": 1})
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 1


def test_a_moved_run_knows_its_best_checkpoint(stopped):
    moved = stopped.parent / "moved"
    stopped.rename(moved)
    best = moved / "runs" / "tiny" / "version_0" / "checkpoints" / "best.ckpt"
    callbacks = read_checkpoint(best.with_name("last.ckpt"))["callbacks"]
    (before,) = (s for key, s in callbacks.items() if key.startswith("ModelCheckpoint"))
    (moved / "tiny.yaml").write_text(CONFIG)
    options = {"resume": "true", "trainer.max_steps": 5}
    after = main(["fit", *arguments(moved, options)]).trainer.checkpoint_callback
    assert after.best_k_models == {str(best): before["best_model_score"]}
    assert after.best_model_path == after.kth_best_model_path == str(best)


@pytest.mark.parametrize("own", [True, False])
def test_all_processes_take_the_best_checkpoint_as_the_first_one_does(stopped, own):
    # The others do not know the folder of a new run: here, theirs has the name of the old one.
    file = stopped / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(file)
    callback = ModelCheckpoint(dirpath=stopped / "moved")
    state = checkpoint["callbacks"][callback.state_key] = {"best_model_path": "before/best.ckpt"}
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(broadcast=lambda decision: own),  # the first one's
        loggers=[CSVLogger(stopped / "runs", "tiny", "version_0")],
        callbacks=[],
        checkpoint_callbacks=[callback],
        ckpt_path=file,
    )
    module = SimpleNamespace(hparams=checkpoint["hyper_parameters"])
    LastCheckpoint().on_load_checkpoint(trainer, module, checkpoint)
    folder = stopped / "moved" if own else Path("before")
    assert state["best_model_path"] == str(folder / "best.ckpt")


def test_a_folder_that_begins_with_a_dot_is_the_same_folder(stopped, monkeypatch):
    """ModelCheckpoint removes the best one before, if that has another name."""
    monkeypatch.chdir(stopped)
    options = {"resume": "true", "runs_dir": "./runs", "trainer.max_steps": 5}
    callback = main(["fit", *arguments(stopped, options)]).trainer.checkpoint_callback
    own = callback.format_checkpoint_name({})
    assert callback.best_model_path == callback.kth_best_model_path == own
    assert list(callback.best_k_models) == [own]


def test_a_run_that_is_refused_to_go_on_stays_as_it_was(stopped):
    run = stopped / "runs" / "tiny" / "version_0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with fails_naming("model.network.down_factors"):
        fit(stopped, resume="true", **{"model.network.down_factors": "[[2, 2]]"})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_goes_on_has_no_result_until_its_new_end(stopped, monkeypatch):
    result = stopped / "runs" / "tiny" / "version_0" / "results.json"
    assert result.is_file()
    stop_at(5, monkeypatch)
    with pytest.raises(SystemExit):
        fit(stopped, resume="true", **{"trainer.max_steps": 8})
    assert not result.exists()


def test_a_run_that_may_stop_early_goes_on(tmp_path):
    early = {"trainer.callbacks+": "EarlyStopping", "trainer.callbacks.monitor": "val/miou"}
    options = {**BY_EPOCHS, **early, "trainer.callbacks.mode": "max"}
    fit(tmp_path, **{**options, "trainer.max_epochs": 1})
    run = fit(tmp_path, **options, resume="true")
    assert [step for step, _, miou in metrics(run) if miou] == [3, 6, 9]


def test_a_run_stopped_at_the_ends_of_its_epochs_ends_where_it_would_have(tmp_path, monkeypatch):
    options = {**BY_EPOCHS, "trainer.accumulate_grad_batches": 1, "resume": "true"}
    options["trainer.check_val_every_n_epoch"] = 3  # three epochs of 7 steps
    for step in (7, 10, 14):
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(SystemExit):
                fit(tmp_path, **options)
    run = fit(tmp_path, **options)
    assert [step for step, loss, _ in metrics(run) if loss] == list(range(21))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["epoch"] == 2


def test_a_run_stopped_after_its_last_step_still_gives_its_result(stopped):
    file = stopped / "runs" / "tiny" / "version_0" / "results.json"
    before = json.loads(file.read_text())
    file.unlink()
    fit(stopped, resume="true", **{"trainer.max_steps": 4})
    after = json.loads(file.read_text())
    assert after["scores"] == before["scores"]
    assert after["step"] == before["step"] == 3  # that of the scores
    assert after["seconds"] >= before["seconds"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({"trainer.max_steps": 4}, 4, id="steps"),
        # Two epochs of seven steps, the second one's validation left out.
        pytest.param(
            {**BY_EPOCHS, "trainer.max_epochs": 2, "trainer.accumulate_grad_batches": 1,
             "trainer.check_val_every_n_epoch": 3},
            14,
            id="epochs",
        ),
    ],
)  # fmt: skip
def test_the_end_is_saved_where_no_validation_comes_there(options, steps, tmp_path):
    run = fit(tmp_path, **{"last_checkpoint.every_n_steps": 100, **options})
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    assert fit(tmp_path, **options, resume="true") == run  # nothing is left to do


def test_the_end_is_saved_when_the_time_is_over(tmp_path, monkeypatch):
    report = Progress.on_train_batch_end

    def end(self, trainer, *args):
        report(self, trainer, *args)
        trainer.should_stop = trainer.global_step == 2

    monkeypatch.setattr(Progress, "on_train_batch_end", end)
    run = fit(tmp_path, **{"last_checkpoint.every_n_steps": 100, "trainer.limit_val_batches": 0})
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_time_adds_up_in_the_folder_of_a_run_and_only_there(tmp_path):
    for folder, seconds in (("run", 1000), ("other", 0)):
        table = ResultTable()
        table.load_state_dict({"scores": {}, "seconds": 1000.0})
        table.on_fit_start(
            SimpleNamespace(
                loggers=[CSVLogger(tmp_path, folder, "version_0")],
                ckpt_path=tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt",
            ),
            None,
        )
        assert seconds <= table.seconds < seconds + 100


def test_settings_that_change_on_going_on_are_said_and_win(stopped, caplog):
    caplog.set_level("INFO", "isanet_pl")
    options = {"trainer.max_steps": 4, "resume": "true"}
    fit(stopped, **options)
    assert "another config" not in caplog.text  # resume itself is none
    rate = "model.optimizer.init_args.lr"
    changed = {"data.batch_size": 1, rate: 0.5, "seed_everything": 1}
    fit(stopped, **changed, **{"wandb_run.log_checkpoint": "true"}, **options)
    (said,) = (r.getMessage() for r in caplog.records if "another config" in r.getMessage())
    assert said.splitlines()[1:] == [
        "  data.batch_size: 2 before, now 1",
        "  model.optimizer.lr: 0.01 before, now 0.5",
        "  seed_everything: 0 before, now 1",
        "  wandb_run.log_checkpoint: False before, now True",
    ]
    assert "training samples go on with the checkpoint's seed 0" in caplog.text


def test_config_keys_are_those_of_the_command_line():
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    data = {"class_path": "CamVid", "init_args": {}}
    assert flatten(
        {"model": {"optimizer": optimizer, "scales": [1]}, "data": data, "plugins": {}}
    ) == {
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "model.scales": [1],
        "data": "CamVid",
        "plugins": {},
    }


def test_overfitting_shows_the_same_samples_in_every_epoch(tmp_path, monkeypatch):
    seen, step = [], SegmentationModule.training_step

    def look(self, batch, index):
        seen.append(batch["name"])
        return step(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", look)
    fit(tmp_path, **{"trainer.overfit_batches": 2, "trainer.max_steps": 6})
    assert seen == seen[:2] * 3


def test_resume_beside_another_checkpoint_is_refused(stopped):
    with fails_naming("--resume continues a run", "--ckpt_path x.ckpt"):
        fit(stopped, resume="true", ckpt_path="x.ckpt")


def test_resume_is_for_fit(stopped):
    with fails_naming("--resume is for fit, not for validate"):
        main(["validate", *arguments(stopped, {"resume": "true"})])


def test_every_n_steps_must_be_positive():
    with fails_naming("last_checkpoint.every_n_steps must be 1 or more: 0"):
        LastCheckpoint(0)


# Which run, which checkpoint


def make_checkpoints(folder, version, **files):
    """Writes whole files, or damaged ones, in this order of time; returns their folder."""
    path = folder / "x" / f"version_{version}" / "checkpoints"
    path.mkdir(parents=True)
    for age, (name, is_whole) in enumerate(files.items()):
        file = path / f"{name}.ckpt"
        with zipfile.ZipFile(file, "w") as content:
            content.writestr("data", "text")
        if not is_whole:
            truncate(file)
        os.utime(file, (age, age))
    return path


def test_the_newest_run_is_found(tmp_path):
    assert find_run(str(tmp_path), "x") is None
    make_checkpoints(tmp_path, "9_old", last=True)  # a copy
    assert find_run(str(tmp_path), "x") is None
    make_checkpoints(tmp_path, 9, last=True)
    newest = make_checkpoints(tmp_path, 10, last=True, best=True)
    (tmp_path / "x" / "version_11").mkdir()  # of validate
    assert find_run(str(tmp_path), "x") == (newest.parent, newest / "last.ckpt")
    make_checkpoints(tmp_path, 12)  # killed before its first checkpoint: starts anew
    assert find_run(str(tmp_path), "x") is None


def test_a_checkpoint_of_half_a_step_is_none_to_go_on_from(tmp_path, monkeypatch):
    """As after a kill between the first validation and the end of the step it came in."""
    found, steps, save = [], [], LastCheckpoint._save

    def look(self, trainer):
        save(self, trainer)
        files = sorted(path.name for path in self._folder(trainer).iterdir())
        if files and files not in (names for _, names in steps):
            steps.append((trainer.global_step, files))
            found.append(find_run(str(tmp_path / "runs"), "tiny"))

    monkeypatch.setattr(LastCheckpoint, "_save", look)
    options = {"trainer.accumulate_grad_batches": 2, "trainer.max_steps": 2}
    run = fit(tmp_path, **options, **{"data.num_train": 14, "last_checkpoint.every_n_steps": 100})
    last = run / "checkpoints" / "last.ckpt"
    # The validation after 3 batches, then the end of the step that it came in.
    assert steps == [(1, ["best.ckpt"]), (2, ["best.ckpt", "last.ckpt"])]
    assert found == [None, (run, last)]


def test_a_validation_in_the_middle_of_a_step_is_logged_once(tmp_path, monkeypatch):
    """As after a kill between that validation and the end of its step."""
    copies, ended = [], LastCheckpoint.on_validation_end

    def copy(self, trainer, pl_module):
        ended(self, trainer, pl_module)
        if not trainer.sanity_checking and not self.stepped:
            copies.append(tmp_path / str(len(copies)))
            shutil.copytree(tmp_path / "runs", copies[-1] / "runs")

    options = {"trainer.accumulate_grad_batches": 2, "trainer.max_steps": 4}
    options |= {"data.num_train": 14, "last_checkpoint.every_n_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_validation_end", copy)
        whole = metrics(fit(tmp_path, **options))
    assert copies
    for folder in copies:
        run = fit(folder, **options, resume="true")
        assert run.name == "version_0"
        assert metrics(run) == whole


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    folder = make_checkpoints(tmp_path, 0, old=True, best=True, last=False)
    assert find_run(str(tmp_path), "x") == (folder.parent, folder / "best.ckpt")
    assert f"{folder / 'last.ckpt'} is damaged: resuming from" in caplog.text


def test_without_a_whole_checkpoint_the_files_are_named(tmp_path):
    folder = make_checkpoints(tmp_path, 0, last=False)
    with fails_naming(f"no checkpoint in {folder} is whole (last.ckpt)", f"remove {folder.parent}"):
        find_run(str(tmp_path), "x")


# Writing and reading


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(descriptor):
        assert (tmp_path / "new" / "last.ckpt.part").stat().st_size > 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with fails_naming(path, "No space left on device; the one before it is kept", "--resume true"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert read_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with fails_naming(path.with_name("best.ckpt"), "there is none before it"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path.with_name("best.ckpt"))


def test_a_checkpoint_takes_its_place_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    flush = os.fsync

    def look(descriptor):
        assert read_checkpoint(path) == {"step": 1}
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert read_checkpoint(path) == {"step": 2}


def test_a_full_disk_ends_the_run_and_says_so(stopped, monkeypatch, capsys):
    last = stopped / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    limit = len(before) // 2

    options = arguments(stopped, {"resume": "true", "trainer.max_steps": 8})
    monkeypatch.setattr(sys, "argv", ["isanet-pl", "fit", *options])
    with full_disk(limit), pytest.raises(SystemExit) as stop:
        run_program()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"cannot write the checkpoint {last}: File too large; the one before it" in said
    assert "Traceback" not in said
    assert last.read_bytes() == before
    assert not list(last.parent.glob("*.part"))


def test_a_disk_that_is_full_for_metrics_is_no_stack_trace_either(tmp_path, monkeypatch):
    def fail(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(CSVLogger, "save", fail)
    with fails_naming("cannot write: No space left on device", "--resume true"):
        fit(tmp_path)


@pytest.mark.parametrize("command", ["--ckpt_path", "--resume"])
def test_a_malicious_checkpoint_does_not_execute(stopped, command):
    mark = stopped / "executed"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    last = stopped / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    torch.save({**read_checkpoint(last), "callbacks": Malicious()}, last.with_name("evil.ckpt"))
    last.with_name("evil.ckpt").replace(last)
    options = {"resume": "true"} if command == "--resume" else {"ckpt_path": last}
    with fails_naming(last, "nothing in it was executed"):
        fit(stopped, **options)
    assert not mark.exists()


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    draw()
    AtomicCheckpointIO().save_checkpoint(random_state(), tmp_path / "a.ckpt")
    expected = draw()
    restore_random_state(read_checkpoint(tmp_path / "a.ckpt"))
    assert draw() == expected


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.csv.old"])
def test_metrics_go_on_from_the_step_of_the_checkpoint(tmp_path, name):
    # .old: killed while it did just this.
    run = tmp_path / "x" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,train/loss\n0,9\n")
    (run / name).write_text("step,train/loss,val/miou\n0,3,\n1,2,\n2,,0.5\n2,1,\n4,,0.6\n")
    AtomicCheckpointIO().save_checkpoint({"global_step": 2}, tmp_path / "a.ckpt")
    logger = CSVLogger(str(tmp_path), "x", "version_0")
    continue_metrics(logger, str(tmp_path / "a.ckpt"))
    assert metrics(run) == [(0, "3", ""), (1, "2", ""), (2, "", "0.5")]
    logger.log_metrics({"train/loss": 7.0}, 2)
    logger.save()
    assert metrics(run)[-1] == (2, "7.0", "")
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("cut", ["2", "2,", "2,0.1,", "2,0.1,0.", "2,0.1,1,0.4,5\n", "2,0.1\n"])
def test_lines_of_metrics_that_were_not_written_whole_are_left_out(tmp_path, cut):
    file = tmp_path / "x" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text(f"lr/new,step,train/loss,val/miou\n0.3,0,3,\n{cut}")
    AtomicCheckpointIO().save_checkpoint({"global_step": 9}, tmp_path / "a.ckpt")
    continue_metrics(CSVLogger(str(tmp_path), "x", "version_0"), str(tmp_path / "a.ckpt"))
    assert metrics(file.parent) == [(0, "3", "")]


def test_metrics_that_cannot_be_written_are_kept_for_the_next_time(tmp_path, monkeypatch):
    file = tmp_path / "x" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text("step,train/loss\n0,3\n1,2\n")
    AtomicCheckpointIO().save_checkpoint({"global_step": 9}, tmp_path / "a.ckpt")

    def fail():
        file.write_text("step,train/loss\n0,")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    logger = CSVLogger(str(tmp_path), "x", "version_0")
    monkeypatch.setattr(logger, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        continue_metrics(logger, str(tmp_path / "a.ckpt"))
    continue_metrics(CSVLogger(str(tmp_path), "x", "version_0"), str(tmp_path / "a.ckpt"))
    assert metrics(file.parent) == [(0, "3", ""), (1, "2", "")]


# SIGTERM


def stop_at(step, monkeypatch):
    """Lets SIGTERM come in the middle of the end of a step."""
    report = Progress.on_train_batch_end

    def ask_to_stop(self, trainer, *args):
        report(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "on_train_batch_end", ask_to_stop)


@pytest.mark.parametrize("step", [2, 3])
def test_sigterm_saves_and_ends(step, tmp_path, monkeypatch, caplog):
    stop_at(step, monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, **{"last_checkpoint.every_n_steps": 100})
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    run = tmp_path / "runs" / "tiny" / "version_0"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == step
    rows = metrics(run)
    assert [row for row, _, score in rows if not score] == [*range(step)]  # nothing of it is lost
    assert [row for row, _, score in rows if score] == [3] * (step == 3)  # a validation is due
    assert f"SIGTERM: stopped after step {step}" in caplog.text


def test_a_run_that_has_ended_listens_no_more(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


# The average of the weights


def test_the_average_follows_the_weights():
    average = ExponentialAverage(0.9)
    averaged, counts = [torch.zeros(3)], [torch.tensor(5)]
    expected = 0.0
    average._average_model = SimpleNamespace(n_averaged=torch.tensor(0))
    for update in range(1, 200):
        average._average_model.n_averaged += 1
        average._update(averaged, [torch.full((3,), float(update))], torch.tensor(update))
        average._update(counts, [torch.tensor(update)], torch.tensor(update))
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        assert averaged[0].tolist() == pytest.approx([expected] * 3, rel=1e-5)
        assert counts[0] == update


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with fails_naming("ema_decay must be above 0 and below 1", decay):
        ExponentialAverage(decay)


def test_the_average_is_on_the_device_of_the_training():
    average, module = ExponentialAverage(0.9), make_module()  # on the CPU, until training starts
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    average.setup(SimpleNamespace(strategy=strategy), module, "fit")
    assert {p.device.type for p in average._average_model.parameters()} == {"meta"}
    assert average._average_model.n_averaged.device.type == "cpu"
    assert {p.device.type for p in module.parameters()} == {"cpu"}


@pytest.mark.parametrize("whole", ["iterations"], indirect=True)
def test_checkpoints_hold_average_and_raw_weights(whole, tmp_path):
    run = whole[2]
    best = read_checkpoint(run / "checkpoints" / "best.ckpt")
    weights = {name: w for name, w in best["state_dict"].items() if name.endswith("conv1.weight")}
    assert weights
    for name, weight in weights.items():
        assert not torch.equal(weight, best["current_model_state"][name])
    network = ISANet.from_checkpoint(run / "checkpoints" / "best.ckpt")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, best["state_dict"][f"network.{name}"])
    # What was validated is the average.
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    options = {"ckpt_path": run / "checkpoints" / "best.ckpt"}
    cli = main(["validate", *arguments(tmp_path, options)])
    scores = {f"{float(miou):.6f}" for _, _, miou in metrics(run) if miou}
    losses = [
        float(row["val/loss"])
        for row in csv.DictReader((run / "metrics.csv").open())
        if row["val/loss"]
    ]
    validated = cli.trainer.callback_metrics
    assert f"{float(validated['val/miou']):.6f}" in scores
    assert any(float(validated["val/loss"]) == pytest.approx(loss, rel=1e-4) for loss in losses)


@pytest.mark.parametrize("whole", ["iterations"], indirect=True)
def test_an_average_is_not_dropped_silently(whole, tmp_path):
    with fails_naming(whole[3][0], "averages its weights", "--ema_decay"):
        fit(tmp_path, ckpt_path=whole[3][0])


# Real processes


def test_the_stress_script_sees_a_single_bit(scripts_on_path):
    from stress_resume import differences

    one = {"a": [torch.zeros(3), 1], "b": {"c": (0.5, None)}}
    other = {"a": [torch.zeros(3), 1], "b": {"c": (0.5, None)}}
    assert not list(differences(one, other, "x"))
    other["a"][0][1] = torch.finfo().tiny
    other["b"]["d"] = 2
    assert list(differences(one, other, "x")) == ["x.a[0]", "x.b.d"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_the_same(tmp_path):
    # 3 stops: SIGKILL, SIGKILL while a checkpoint is written, SIGTERM; 0, 1 and 4 loader processes.
    done = subprocess.run(
        [sys.executable, SCRIPT, "--stops", "3", "--steps", "30"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference, bit for bit" in done.stdout
    assert done.stdout.count("SIGKILL") == 2
    assert all(f"  {number} workers  " in done.stdout for number in (0, 1, 4))


def test_a_run_that_fails_does_not_wait_for_its_loader_processes(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    options = {
        "data.num_workers": 1,
        "trainer.enable_progress_bar": "true",  # or nothing is printed
        "trainer.max_steps": 10_000,
        "progress.every_n_steps": 1,
    }
    command = [sys.executable, "-m", "isanet_pl", "fit", *arguments(tmp_path, options)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    )
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.stdout.close()  # as `head` does: the next line cannot be printed
    assert process.wait(timeout=25) == 1  # below the grace of a loader process
