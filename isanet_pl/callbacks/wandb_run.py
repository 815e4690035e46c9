"""The W&B side of a run: its logger, and what Lightning's logger does not do by itself."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
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

log = logging.getLogger(__name__)


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
        said = os.environ.get("WANDB_MODE")
        if said in ("offline", "dryrun", "disabled"):
            raise InputError(f"--wandb online, but WANDB_MODE is {said}: unset it, or --wandb auto")
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
        name: Of a new run; in a sweep, W&B names them itself.
        folder: The run folder.
        job: The command, W&B's job type.
        checkpoint: The checkpoint that `fit` continues; None: a new run.
    """
    known = None if checkpoint is None else read_checkpoint(checkpoint).get(RUN_ID)
    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "isanet-pl"),
        # A run that continues keeps the name of its first folder. In a sweep, machines count
        # their folders alone, so that several would have one name.
        name=name if known is None and "WANDB_SWEEP_ID" not in os.environ else None,
        id=known,
        save_dir=folder.absolute(),  # its service may have been started in another folder
        mode=mode,
        job_type=job,
    )


def wandb_loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    """Returns those of a trainer's loggers that are W&B's."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


@contextmanager
def training_goes_on(what: str) -> Iterator[None]:
    """Makes an error of W&B a warning: it asks its server anew for the first table or artifact.

    Args:
        what: W&B then does not have it.
    """
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        log.warning("W&B has not taken %s; the run goes on: %s", what, error)


class WandbRun(pl.Callback):
    """Completes a W&B run: its best score, its id in checkpoints, the best checkpoint.

    Args:
        log_checkpoint: Add the best checkpoint to the W&B run when `fit` ends, as an artifact.
    """

    def __init__(self, log_checkpoint: bool = False) -> None:
        self.log_checkpoint = log_checkpoint
        self.best = 0.0

    @staticmethod
    def _logger(trainer: pl.Trainer) -> WandbLogger | None:
        return next(iter(wandb_loggers(trainer)), None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best score up to now."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best score of a run that continues."""
        self.best = state_dict["best"]

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Logs the best val mIoU up to now, which the run's summary then shows at the end."""
        # Not `define_metric(summary="max")`: W&B takes that anew from where a run is resumed.
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.best = max(self.best, float(trainer.callback_metrics["val/miou"]))
        logger = self._logger(trainer)
        if logger is not None:
            logger.log_metrics({"val/best_miou": self.best}, pl_module.trained_steps)

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
            with training_goes_on("the best checkpoint"):
                logger.experiment.log_artifact(artifact, aliases=["best"])
