"""The bar that a terminal shows while a command runs."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's bar, which knows how many epochs a number of steps is.

    Lightning's own calls the epochs of such a run "0/-2", and its version "on_0", by the last four
    letters of version_0.
    """

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Returns what is shown beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return dict(metrics)

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
