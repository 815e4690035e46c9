"""The W&B side of a run: its logger, and what Lightning's logger does not do by itself."""

import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from isanet_pl.checkpoint_io import read_checkpoint
from isanet_pl.errors import InputError

Mode = Literal["off", "offline", "online", "auto"]
RUN_ID = "wandb_run_id"
"""Where a checkpoint keeps the id of its W&B run."""


@rank_zero_only
def resolve_mode(mode: Mode) -> str | None:
    """Returns offline, online or WANDB_MODE; None for off, and on processes that log nothing.

    Raises:
        InputError: There is no usable API key.
    """
    if mode in ("off", "offline"):
        return None if mode == "off" else mode
    if mode == "auto" and "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    import wandb  # nothing of W&B is needed or loaded without it

    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise InputError(f"{error}; run `wandb login` anew, or use --wandb offline") from error
    if mode == "online" and not has_key:
        raise InputError(
            "--wandb online found no API key: run `wandb login`, set WANDB_API_KEY, or use "
            "--wandb offline"
        )
    return "online" if has_key else "offline"


def wandb_logger(
    mode: str, name: str, folder: Path, job: str, checkpoint: str | None
) -> WandbLogger:
    """Returns a logger of a new W&B run, or of the one that a checkpoint comes from.

    Project, group and tags are those of WANDB_PROJECT, WANDB_RUN_GROUP and WANDB_TAGS.

    Args:
        mode: Where the run goes; see `resolve_mode`.
        name: Of a new run.
        folder: The run folder.
        job: The command, W&B's job type.
        checkpoint: The checkpoint that `fit` continues; None: a new run.
    """
    known = None if checkpoint is None else _run_id(checkpoint)
    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "isanet-pl"),
        # A run that continues keeps the name of its first folder.
        name=name if known is None else None,
        id=known,
        save_dir=folder.absolute(),  # its service may have been started in another folder
        mode=mode,
        job_type=job,
    )


def _run_id(checkpoint: str) -> str | None:
    known: str | None = read_checkpoint(checkpoint).get(RUN_ID)
    return known


class WandbRun(pl.Callback):
    """Completes a W&B run: best score as its summary, its id in checkpoints, the best checkpoint.

    Args:
        log_checkpoint: Add the best checkpoint to the W&B run when `fit` ends, as an artifact.
    """

    def __init__(self, log_checkpoint: bool = False) -> None:
        self.log_checkpoint = log_checkpoint

    @staticmethod
    def _logger(trainer: pl.Trainer) -> WandbLogger | None:
        found = (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))
        return next(found, None)

    @rank_zero_only
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the summary of a run show its best validation, not its last."""
        logger = self._logger(trainer)
        if logger is not None:
            logger.experiment.define_metric(
                "val/miou", step_metric="trainer/global_step", step_sync=True, summary="max"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the id of the run, so that a resumed one continues it."""
        logger = self._logger(trainer)
        if logger is not None:
            checkpoint[RUN_ID] = logger.version

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the best checkpoint to the run, if that is wanted."""
        logger = self._logger(trainer)
        if logger is None or not self.log_checkpoint:
            return
        import wandb

        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.best_model_score is None:
                continue  # not the best but the last, or no validation
            score = {str(callback.monitor): float(callback.best_model_score)}
            artifact = wandb.Artifact(f"isanet-{logger.version}", type="model", metadata=score)
            # The file stays as it is from here on: W&B need not copy it to upload it.
            artifact.add_file(str(Path(callback.best_model_path).resolve()), policy="immutable")
            logger.experiment.log_artifact(artifact, aliases=["best"])
