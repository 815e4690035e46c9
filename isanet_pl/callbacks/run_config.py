"""The config of a run: in its folder, in its checkpoints, in W&B."""

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from isanet_pl.callbacks.results import code_version
from isanet_pl.callbacks.wandb_run import wandb_loggers

log = logging.getLogger(__name__)

CONFIG = "config"
"""Where a checkpoint keeps the config."""
OF_A_COMMAND = ("config", "ckpt_path", "resume", "name", "runs_dir", "wandb")
"""What says where a run is, not what it does."""


class RunConfig(SaveConfigCallback):
    """Saves the config as `config.yaml`, in checkpoints, and with the code's version in W&B.

    A run that goes on from a checkpoint does so with its own config, and says where the two differ.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Saves the config of an evaluation, if there is a run folder."""
        if trainer.loggers and stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the config of a fit, if there is a run folder."""
        # Not before: a run that is refused to go on would be left with a config that is not its.
        if trainer.loggers:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the config to W&B; the file is written already."""
        for logger in wandb_loggers(trainer):
            logger.log_hyperparams(self._plain | {"git": code_version()})

    @cached_property
    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(self.parser.dump(self.config, "json", skip_unset=False))
        return plain

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the config."""
        checkpoint[CONFIG] = self._plain

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Says where training goes on with other settings than those of the checkpoint."""
        if trainer.state.fn != "fit" or not trainer.is_global_zero or CONFIG not in checkpoint:
            return
        old, new = flatten(checkpoint[CONFIG]), flatten(self._plain)
        differences = [
            f"{key}: {old.get(key)} before, now {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key.split(".")[0] not in OF_A_COMMAND
        ]
        if differences:
            log.info("going on with another config:\n  %s", "\n  ".join(differences))


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config by dotted key, classes and their arguments as the command line spells them.

    Args:
        config: Nested, as `config.yaml` holds it.
    """
    flat: dict[str, Any] = {}

    def walk(value: Any, key: tuple[str, ...]) -> None:
        if isinstance(value, Mapping) and value:
            for name, part in value.items():
                if name in ("class_path", "init_args"):
                    walk(part, key)
                else:
                    walk(part, (*key, str(name)))
        else:
            flat.setdefault(".".join(key), value)  # the class, not its empty arguments

    walk(config, ())
    return flat
