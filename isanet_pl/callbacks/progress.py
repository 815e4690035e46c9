"""How far a run is: the bar that a terminal shows, lines where there is none, and the logs."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from isanet_pl.errors import InputError
from isanet_pl.hardware import peak_memory


class Progress(pl.Callback):
    """Logs learning rates, images/s and memory; our bar shows the first two, and the loss.

    Where there is no terminal to draw a bar on, it prints a line now and then instead.

    Args:
        every_n_steps: Optimiser steps between two measurements and lines.

    Raises:
        InputError: `every_n_steps` is below 1.
    """

    EVERY_SECONDS = 10.0
    """Between two lines of what does not train."""

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise InputError(f"progress.every_n_steps must be 1 or more: {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.images = 0
        self.since: float | None = None
        self.first_step = 0
        self.step = 0  # optimiser steps at the end of the last batch
        self.start = 0.0
        self.begun = self.printed = 0.0  # of a pass over a split
        self.seen = 0  # images of it
        self.shown: dict[str, float | str] = {}  # beside the bar

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes where the run starts."""
        self.start = time.monotonic()
        self.first_step = self.step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock, first and after each validation with all that it draws and saves."""
        if self.since is None:
            self.since = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts images; reports when it is time to."""
        self.images += len(batch["image"]) * trainer.world_size
        # An epoch's last batch ends a step even if it is not the last of its group.
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if not stepped or trainer.global_step % self.every_n_steps:
            return
        assert self.since is not None
        speed = self.images / (time.monotonic() - self.since)
        rates = {
            f"lr/{group.get('name', i)}": float(group["lr"])
            for i, group in enumerate(trainer.optimizers[0].param_groups)
        }
        pl_module.log_dict({**rates, "images_per_s": speed, **peak_memory(pl_module.device)})
        # Not by Lightning's `prog_bar`, which waits for the device after every batch.
        loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        written = {name: f"{rate:.1e}" for name, rate in rates.items()}
        self.shown = {"train/loss": loss, **written, "images_per_s": speed}
        self._print(trainer, loss, written, speed)
        self.images, self.since = 0, time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts to count the images of a split."""
        self.begun = self.printed = time.monotonic()
        self.seen = 0

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints how far the split is, now and then."""
        batches = trainer.num_val_batches
        if trainer.state.fn in ("test", "predict"):
            testing = trainer.state.fn == "test"
            batches = trainer.num_test_batches if testing else trainer.num_predict_batches
        self.seen += len(batch["name"]) * trainer.world_size
        if not trainer.sanity_checking:
            self._print_share(trainer, (batch_idx + 1) / sum(batches))

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    @rank_zero_only
    def _print_share(self, trainer: pl.Trainer, share: float) -> None:
        now = time.monotonic()
        if _is_quiet(trainer) or now - self.printed < self.EVERY_SECONDS:
            return
        self.printed, taken = now, now - self.begun
        left = taken / share * (1 - share) / 60
        print(
            f"{100 * share:.0f} %  {self.seen / taken:.1f} images/s  {left:.1f} min left",
            flush=True,
        )

    @rank_zero_only
    def _print(
        self, trainer: pl.Trainer, loss: float, rates: Mapping[str, str], speed: float
    ) -> None:
        if _is_quiet(trainer):
            return
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        per_step = (time.monotonic() - self.start) / max(1, step - self.first_step)
        print(
            f"step {step}/{total}  loss {loss:.3f}  "
            + "  ".join(f"{name} {rate}" for name, rate in rates.items())
            + f"  {speed:.1f} images/s  {per_step * (total - step) / 60:.1f} min left",
            flush=True,
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the score of this validation; stops the clock."""
        self.since, self.images = None, 0
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print_score(trainer)

    @rank_zero_only
    def _print_score(self, trainer: pl.Trainer) -> None:
        score = float(trainer.callback_metrics.get("val/miou", math.nan))
        print(f"step {trainer.global_step}: val/miou {score:.4f}", flush=True)


def _is_quiet(trainer: pl.Trainer) -> bool:
    """Returns whether no lines are wanted: a terminal has a bar, or nothing is to be shown."""
    return sys.stdout.isatty() or trainer.progress_bar_callback is None


class ProgressBar(RichProgressBar):
    """Lightning's bar, with what `Progress` measures, and the epochs that a number of steps is.

    Lightning's own calls the epochs of such a run "0/-2", and its version "on_0", by the last four
    letters of version_0.
    """

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Returns what is shown beside the bar."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Progress):
                metrics |= callback.shown
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        """Returns the text before the bar; Lightning has no public way to change it."""
        last = last_epoch(self.trainer)
        text = f"Epoch {current_epoch}" + ("" if last is None else f"/{last}")
        return f"{text:{len(self.validation_description)}}"  # the bars below have no other width


def last_epoch(trainer: pl.Trainer) -> int | None:
    """Returns the number of a training's last epoch, counted from 0; None if it has no end."""
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs)
    if trainer.max_steps >= 0 and trainer.num_training_batches:
        # The last step of an epoch may be one of fewer batches.
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        ends.append(math.ceil(trainer.max_steps / steps))
    return max(0, min(ends) - 1) if ends else None
