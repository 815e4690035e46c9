"""Learning rates: the poly schedule, and what becomes of a rate with another batch size."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

log = logging.getLogger(__name__)


def poly_schedule(
    total_steps: int, power: float, end_factor: float, warmup_fraction: float
) -> Callable[[int], float]:
    """Returns the learning rate, as a factor of its base, for each optimiser step 0, 1, ...

    Linear from zero over the warm-up, then (1 - progress)^power from 1 down to `end_factor`.
    """
    warmup_steps = round(total_steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return end_factor + (1 - end_factor) * float((1 - progress) ** power)

    return factor


@dataclass(frozen=True)
class StepImages:
    """The images of an optimiser step.

    Args:
        devices: Of all machines.
        batch_size: Of each device.
        accumulated: Batches of a step.
    """

    devices: int
    batch_size: int
    accumulated: int

    def __int__(self) -> int:
        return self.devices * self.batch_size * self.accumulated

    def __str__(self) -> str:
        return (
            f"a step sees {int(self)} images ({self.devices} devices x batch_size "
            f"{self.batch_size} x accumulate_grad_batches {self.accumulated})"
        )


def fit_lr_to_batch(optimizer: Optimizer, images: StepImages, reference: int, scale: bool) -> None:
    """Scales the learning rates to the images of a step, or warns that they do not fit.

    Args:
        optimizer: Its rates are changed in place.
        images: Of a step.
        reference: The number of images that the rates were set for.
        scale: Multiply them by the ratio of the two; otherwise only warn.
    """
    if int(images) == reference:
        return
    found = f"{images}, but the learning rate was set for {reference}"
    if scale:
        for group in optimizer.param_groups:
            group["lr"] *= int(images) / reference
        log.info("%s: it is multiplied by %g", found, int(images) / reference)
        return
    fixes = ["--model.scale_lr true"]
    for option, others in (
        ("--trainer.accumulate_grad_batches", images.devices * images.batch_size),
        ("--data.batch_size", images.devices * images.accumulated),
    ):
        if reference % others == 0:
            fixes.insert(0, f"{option} {reference // others}")
    rank_zero_only(log.warning)("%s; set %s", found, " or ".join(fixes))
