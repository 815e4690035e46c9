"""Exponential moving average of the weights."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from isanet_pl.errors import InputError


class ExponentialAverage(WeightAveraging):
    """Keeps an exponential moving average of the weights, and validates with it.

    Checkpoints hold both: the average is what `validate`, `predict` and `ISANet.from_checkpoint`
    load, the raw weights are what training goes on with. BatchNorm's statistics are averaged too.

    After n updates the decay is (1 + n) / (10 + n) at most, as in TensorFlow's
    ExponentialMovingAverage. Lightning's own EMAWeightAveraging has no such start: after 300 steps
    with 0.999, three quarters of it would still be the weights of the first step.

    Args:
        decay: Share of the average that an update keeps.

    Raises:
        InputError: The decay is not between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"ema_decay must be above 0 and below 1, such as 0.999, got {decay}")
        self.decay = decay
        super().__init__(multi_avg_fn=self._update)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts the average, on the device that the module is about to move to."""
        # The module is still on the CPU: an average there would have to fetch all weights at each
        # step.
        self._device = trainer.strategy.root_device
        # The average is a copy of the module. What makes the optimiser leads to the command line's
        # trainer, which holds the processes of a run on several devices: they cannot be copied.
        module: Any = pl_module
        optimizer, module.optimizer = module.optimizer, None
        try:
            super().setup(trainer, pl_module, stage)
        finally:
            module.optimizer = optimizer
        if self._average_model is not None:
            # On the CPU: at each look at it, of which AveragedModel takes two a step and `_update`
            # more, a GPU would have to finish its work first.
            self._average_model.n_averaged = torch.tensor(0)

    @torch.no_grad()
    def _update(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor
    ) -> None:
        assert self._average_model is not None
        count = int(self._average_model.n_averaged)  # `num_averaged` is a copy on the device
        share = 1 - min(self.decay, (1 + count) / (10 + count))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(list(averaged), list(current), share)
        else:  # BatchNorm's count of batches
            torch._foreach_copy_(list(averaged), list(current))
