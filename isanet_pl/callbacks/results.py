"""What a run leaves at its end: the table of its scores and `results.json`."""

import json
import logging
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isanet_pl.checkpoint_io import write_text_whole
from isanet_pl.hardware import describe_machine
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet
from isanet_pl.run_folder import remove_if_empty, run_folder

log = logging.getLogger(__name__)

RESULTS = "results.json"
"""What a run that has ended leaves in its folder."""


def code_version() -> str | None:
    """Returns the git commit of this code, with "-dirty" if files have changed since.

    None where the code is not in a git repository.
    """
    here = Path(__file__)
    # An installed copy may lie inside some other project's repository, which does not track it.
    commands = (
        ("ls-files", "--error-unmatch", here.name),
        ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    )
    answer = ""
    for command in commands:
        try:
            answer = subprocess.check_output(
                ("git", *command), cwd=here.parent, stderr=subprocess.DEVNULL, text=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
    return answer.strip()


class ResultTable(pl.Callback):
    """Ends fit, validate and test with a table, and writes `results.json` into the run folder."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.code: str | None = None
        self.scores: dict[str, float] = {}  # of the last validation of a fit
        self.scored_step: int | None = None  # the steps behind the weights that have them
        self.image_size: tuple[int, int] | None = None  # of the first image that was scored
        self.earlier = 0.0  # seconds, up to the checkpoint that it goes on from

    @property
    def seconds(self) -> float:
        """Returns how long the run has taken, without what a killed process did in vain."""
        return time.monotonic() - self.start

    def state_dict(self) -> dict[str, Any]:
        """Returns what a run that goes on cannot find out again."""
        return {
            "scores": self.scores,
            "scored_step": self.scored_step,
            "image_size": self.image_size,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.scores = state_dict["scores"]
        self.scored_step = state_dict.get("scored_step")
        self.image_size = state_dict.get("image_size")
        self.earlier = state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the time of before, if the run goes on in its own folder."""
        folder = run_folder(trainer)
        if folder is not None and trainer.ckpt_path is not None:
            if Path(trainer.ckpt_path).resolve().is_relative_to(folder.resolve()):
                self.start -= self.earlier
            else:
                self.image_size = None  # the data may be others

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the result of a run that had ended and now goes on."""
        folder = run_folder(trainer)
        if folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            (folder / RESULTS).unlink(missing_ok=True)

    @rank_zero_only
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes the code that runs; it may be changed before the run ends."""
        self.code = code_version()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the size of the images that the checkpoint was validated on."""
        if trainer.state.fn != "fit":
            self.image_size = None

    on_test_start = on_validation_start

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Notes for which size of image the cost is given."""
        self.image_size = self.image_size or tuple(batch["image"].shape[-2:])

    on_test_batch_start = on_validation_batch_start

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the last validation."""
        # That of the end, in a run of an older version that had nothing left to do.
        step = trainer.global_step if self.scored_step is None else self.scored_step
        self._report(trainer, pl_module, "val", self.scores, step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports `validate`; in a fit, keeps the scores for the end."""
        if trainer.state.fn == "validate":
            self._report_now(trainer, pl_module, "val")
        elif not trainer.sanity_checking:
            self.scores, self.scored_step = _scores(trainer, "val"), trainer.global_step

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports `test`."""
        self._report_now(trainer, pl_module, "test")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Removes the run folder if nothing was written to it, as when the data is refused."""
        folder = run_folder(trainer) if trainer.is_global_zero else None
        if folder is not None:
            remove_if_empty(folder)

    def _report_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # An ONNX file does not say how long it was trained for.
        known = isinstance(pl_module.network, ISANet)
        step: Any = pl_module.trained_steps if known else None
        self._report(trainer, pl_module, stage, _scores(trainer, stage), step)

    @rank_zero_only
    def _report(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stage: str,
        scores: Mapping[str, float],
        step: int | None,
    ) -> None:
        if "miou" not in scores:
            if trainer.limit_val_batches:
                log.warning(
                    "the fit ended before its first validation (%s): there are no scores, and "
                    "there is no %s; give a lower --trainer.val_check_interval",
                    f"--trainer.val_check_interval {trainer.val_check_interval}",
                    RESULTS,
                )
            return
        folder = None if trainer.fast_dev_run else run_folder(trainer)  # type: ignore[attr-defined]
        if folder is not None:  # first: a run whose table fails has ended all the same
            device = trainer.strategy.root_device  # the module is back on the CPU at a fit's end
            gmacs = self._gmacs(pl_module)
            record = {
                "command": shlex.join(["isanet-pl", *sys.argv[1:]]),
                "stage": stage,
                "step": step,
                "seconds": round(self.seconds),
                "machine": describe_machine(device, trainer.world_size),
                "torch": torch.__version__,
                "git": self.code,
                "parameters": sum(p.numel() for p in pl_module.parameters()) or None,
                "gmacs": round(sum(gmacs.values()), 4) if gmacs else None,
                "context_gmacs": round(gmacs["context"], 4) if gmacs else None,
                "image_size": self.image_size,
                "scores": {k: None if math.isnan(v) else round(v, 6) for k, v in scores.items()},
            }
            # Whole: this file says that the run has ended.
            text = json.dumps(record, indent=2) + "\n"
            write_text_whole(folder / RESULTS, text)
        Console(width=None if sys.stdout.isatty() else 80).print(_table(stage, scores))
        if folder is not None:
            print(f"written to {folder}")

    def _gmacs(self, pl_module: pl.LightningModule) -> dict[str, float] | None:
        # An ONNX file cannot be asked; a run that had nothing left to do has seen no image.
        if not isinstance(pl_module.network, ISANet) or self.image_size is None:
            return None
        inference = cast(Inference, pl_module.inference)
        return inference.count_parts(pl_module.network, *self.image_size)


def _scores(trainer: pl.Trainer, stage: str) -> dict[str, float]:
    """Returns the latest scores of a stage, without its name."""
    return {
        name.removeprefix(f"{stage}/"): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(f"{stage}/")
    }


def _table(stage: str, scores: Mapping[str, float]) -> Table:
    table = Table(title=f"{stage}: {100 * scores['miou']:.2f} mIoU", title_justify="left")
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, value in scores.items():
        if name.startswith("iou/"):
            text = "absent" if math.isnan(value) else f"{100 * value:.2f}"
            table.add_row(escape(name.removeprefix("iou/")), text)  # [a] is no markup
    table.add_section()
    for name, label in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")):
        table.add_row(label, f"{100 * scores[name]:.2f}")
    return table
