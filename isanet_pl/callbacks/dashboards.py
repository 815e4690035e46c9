"""Pictures of a run: PNG files in its folder, and the same in TensorBoard and W&B."""

import csv
import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from isanet_pl.callbacks.wandb_run import training_goes_on, wandb_loggers
from isanet_pl.data.files import IGNORE
from isanet_pl.pictures import draw_class_scores, draw_confusion, draw_panels, render
from isanet_pl.run_folder import run_folder


def log_figure(trainer: pl.Trainer, figure: Figure, key: str, file: str, step: int) -> None:
    """Saves a figure as PNG and adds it to TensorBoard and W&B, where they are used.

    Args:
        trainer: The trainer.
        figure: The figure.
        key: Its name in TensorBoard and W&B.
        file: Its file in the run folder.
        step: Optimiser steps behind what it shows.
    """
    pixels = render(figure)
    folder = run_folder(trainer)
    if folder is not None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [pixels], step)


class ClassScores(pl.Callback):
    """Shows the IoU of each class and the confusion matrix at every validation and test.

    The run folder keeps those of the last one: `iou_STAGE.png`, `confusion_STAGE.png` and
    `confusion_STAGE.csv`, the numbers of pixels, a row for each true class.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the scores of a validation."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the scores of a test."""
        self._show(trainer, pl_module, "test")

    @rank_zero_only
    def _show(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names, step = pl_module.class_names, pl_module.trained_steps
        confusion = pl_module.metrics[stage].confusion.cpu()
        logged = trainer.callback_metrics
        iou = {name: float(logged[f"{stage}/iou/{name}"]) for name in names}
        folder = run_folder(trainer)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _write_counts(folder / f"confusion_{stage}.csv", confusion, names)
        figure = draw_confusion(confusion, names)
        log_figure(trainer, figure, f"{stage}/confusion", f"confusion_{stage}.png", step)
        figure = draw_class_scores(iou, float(logged[f"{stage}/miou"]))
        log_figure(trainer, figure, f"{stage}/iou", f"iou_{stage}.png", step)
        # Figures are large cycles of references, which Python by itself leaves for a long time.
        gc.collect()
        for logger in wandb_loggers(trainer):
            _log_tables(logger, confusion, iou, stage, step)


def _write_counts(path: Path, confusion: Tensor, class_names: list[str]) -> None:
    """Writes a confusion matrix (K, K), a row for each true class, below the names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([class_names, *confusion.tolist()])


def _log_tables(
    logger: WandbLogger, confusion: Tensor, iou: Mapping[str, float], stage: str, step: int
) -> None:
    """Adds a table of the classes, its bar chart, and a table of the confusion matrix to W&B.

    Args:
        logger: Of W&B.
        confusion: (K, K) integer, pixels of each true class by predicted class.
        iou: Of each class, in their order; NaN for one that is absent.
        stage: `val` or `test`.
        step: Optimiser steps behind the weights.
    """
    import wandb

    pixels = confusion.sum(dim=1)
    accuracies = (confusion.diag() / pixels).tolist()
    scores = [
        [None if math.isnan(score) else score for score in pair]  # absent classes: empty cells
        for pair in zip(iou.values(), accuracies, strict=True)
    ]
    classes = wandb.Table(
        columns=["class", "IoU", "accuracy", "pixels"],
        data=[[n, *s, p] for n, s, p in zip(iou, scores, pixels.tolist(), strict=True)],
    )
    rows = [[name, *counts] for name, counts in zip(iou, confusion.tolist(), strict=True)]
    charts = {
        f"{stage}/classes": classes,
        f"{stage}/iou_chart": wandb.plot.bar(classes, "class", "IoU", title=f"{stage} IoU"),
        f"{stage}/confusion_counts": wandb.Table(columns=["truth", *iou], data=rows),
    }
    with training_goes_on(f"the tables of step {step}"):
        logger.log_metrics(charts, step)  # type: ignore[arg-type]  # takes W&B's own types too


class PredictionPanels(pl.Callback):
    """Shows the same few images, their truth and prediction, at every validation and test.

    They go to `panels/` in the run folder. In W&B, `STAGE/predictions` has truth and prediction as
    layers to switch on and off.

    Args:
        num_images: Images in a picture, spread evenly over the split; 0 switches it off. With
            several processes, the nearest ones that the first process sees.
    """

    def __init__(self, num_images: int = 4) -> None:
        self.num_images = num_images
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.names: list[str] = []

    def _collect(
        self, trainer: pl.Trainer, loader: Any, batches: int, batch: Any, outputs: Any, index: int
    ) -> None:
        """Keeps the chosen ones among the images of a batch.

        Args:
            trainer: The trainer.
            loader: Of the split.
            batches: How many batches of it are evaluated.
            batch: `image` uint8 (N, 3, H, W), `mask` (N, H, W), `name` N file names.
            outputs: Class maps (N, H, W).
            index: Of the batch.
        """
        start, processes = index * loader.batch_size, trainer.world_size
        total = min(len(loader.dataset), batches * loader.batch_size * processes)
        count = min(self.num_images, total)
        # Lightning deals the images out in turns: the first process gets every processes-th.
        chosen = {(2 * i + 1) * total // (2 * count) // processes for i in range(count)}
        for i, name in enumerate(batch["name"]):
            if start + i in chosen:
                image, truth = batch["image"][i], batch["mask"][i]
                self.rows.append((image.cpu(), truth.cpu(), outputs[i].cpu()))
                self.names.append(name)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the chosen images of the batch."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            batches = int(trainer.num_val_batches[0])
            self._collect(trainer, trainer.val_dataloaders, batches, batch, outputs, batch_idx)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the chosen images of the batch."""
        if trainer.is_global_zero:
            batches = int(trainer.num_test_batches[0])
            self._collect(trainer, trainer.test_dataloaders, batches, batch, outputs, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the images of a validation."""
        self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the images of a test."""
        self._show(trainer, pl_module, "test")

    @rank_zero_only
    def _show(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        rows, names = self.rows, self.names
        self.rows, self.names = [], []
        if not rows or not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = pl_module.trained_steps
        figure = draw_panels(rows, pl_module.class_names, pl_module.palette)
        log_figure(trainer, figure, f"{stage}/panels", f"panels/{stage}_step={step:06d}.png", step)
        labels = {**dict(enumerate(pl_module.class_names)), IGNORE: "ignored"}
        for logger in wandb_loggers(trainer):
            padded = _of_one_size(rows)
            logger.log_image(
                f"{stage}/predictions",
                [image.permute(1, 2, 0).numpy() for image, _, _ in padded],
                step,
                caption=[Path(name).name for name in names],
                masks=[_layers(truth, prediction, labels) for _, truth, prediction in padded],
            )


def _of_one_size(rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """Returns (image, truth, prediction) padded to the largest: W&B shows all at one size.

    Args:
        rows: uint8 (3, H, W), and class maps (H, W).
    """
    height, width = (max(truth.shape[i] for _, truth, _ in rows) for i in (0, 1))
    return [
        tuple(
            F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=fill)
            for x, fill in zip(row, (0, IGNORE, IGNORE), strict=True)
        )
        for row in rows
    ]


def _layers(truth: Tensor, prediction: Tensor, labels: Mapping[int, str]) -> dict[str, Any]:
    """Returns W&B's description of two class maps that lie over an image."""
    return {
        name: {"mask_data": classes.to(torch.uint8).numpy(), "class_labels": labels}
        for name, classes in (("truth", truth), ("prediction", prediction))
    }
