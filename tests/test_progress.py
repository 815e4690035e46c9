"""What a run shows of its speed, and of how far it is."""

import re
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_dashboards import fit
from test_module import make_loader, make_module

from isanet_pl.callbacks import progress
from isanet_pl.callbacks.progress import Progress, ProgressBar, last_epoch


def test_images_per_second_leave_out_validation_and_what_it_draws_and_saves(monkeypatch):
    now, logged = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # no lines
    trainer = SimpleNamespace(
        global_step=0,
        world_size=2,
        optimizers=[SimpleNamespace(param_groups=[{"name": "new", "lr": 0.1}])],
        state=SimpleNamespace(fn="validate"),
        callback_metrics={"train/loss": torch.tensor(0.5)},
    )
    module = SimpleNamespace(log_dict=logged.append, device=torch.device("cpu"))
    shown = Progress(every_n_steps=2)
    shown.on_train_start(trainer, module)
    for step in range(1, 5):
        shown.on_train_batch_start(trainer, module, None, step - 1)
        now[0] += 2
        trainer.global_step = step
        batch = {"image": torch.zeros(3, 1)}
        shown.on_train_batch_end(trainer, module, None, batch, step - 1)
        if step == 2:
            shown.on_validation_end(trainer, module)
            now[0] += 100  # another callback draws, a checkpoint is saved
    # 2 steps of 3 images on each of 2 processes, in 4 seconds
    assert [values["images_per_s"] for values in logged] == [3.0, 3.0]
    assert shown.shown == {"train/loss": 0.5, "lr/new": "1.0e-01", "images_per_s": 3.0}


def test_the_bar_shows_loss_rate_and_speed(tmp_path):
    bar = ProgressBar()
    logger, progress = CSVLogger(tmp_path), Progress(every_n_steps=2)
    trainer, module = fit(logger, bar, progress, enable_progress_bar=True)
    shown = bar.get_metrics(trainer, module)
    assert shown["train/loss"] == float(trainer.callback_metrics["train/loss"])
    assert {"lr/new", "images_per_s"} < set(shown)
    assert "v_num" not in shown


@pytest.mark.parametrize(
    ("options", "batches", "last"),
    [
        ({"max_steps": 10}, 4, 2),  # 4 + 4 + 2
        ({"max_steps": 8}, 4, 1),
        ({"max_steps": 3}, 4, 0),
        ({"max_steps": 5, "accumulate_grad_batches": 3}, 4, 2),  # 2 steps an epoch
        ({"max_epochs": 3}, 4, 2),
        ({"max_epochs": 2, "max_steps": 100}, 4, 1),
        ({"max_epochs": -1}, 4, None),
        ({"max_epochs": 1}, 0, 0),
    ],
)
def test_the_bar_knows_the_last_epoch(options, batches, last):
    trainer = pl.Trainer(**options, logger=False, barebones=True)
    trainer.fit_loop.max_batches = batches
    assert last_epoch(trainer) == last


def test_progress_is_told_at_steps_that_end_an_epoch_with_fewer_batches(monkeypatch):
    # 3 batches, two a step: the second one ends steps 1, 3, ..., the third one steps 2, 4, ...
    steps = []

    def tell(self, trainer, loss, rates, speed):
        steps.append(trainer.global_step)

    monkeypatch.setattr(Progress, "_print", tell)
    options = {"limit_train_batches": 3, "accumulate_grad_batches": 2, "val_check_interval": 3}
    fit(False, Progress(every_n_steps=2), steps=5, **options)
    assert steps == [2, 4]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_long_pass_says_how_far_it_is(command, monkeypatch, capsys):
    """Three batches of two images and one of one, four seconds each; a line every five."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Progress, "EVERY_SECONDS", 5.0)

    class Slow(pl.Callback):
        def _wait(self, *_):
            now[0] += 4

        on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _wait

    bar = pl.callbacks.TQDMProgressBar()
    trainer = pl.Trainer(
        callbacks=[Slow(), Progress(), bar], logger=False, accelerator="cpu", max_epochs=1,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    loader = make_loader(7)
    trainer.num_sanity_val_steps = 0
    loaders = (loader, loader) if command == "fit" else (loader,)
    getattr(trainer, command)(make_module(), *loaders)
    text = capsys.readouterr().out
    assert re.findall(r"\d+ %  [\d.]+ images/s  [\d.]+ min left\n", text) == [
        "50 %  0.5 images/s  0.1 min left\n",
        "100 %  0.4 images/s  0.0 min left\n",
    ]
