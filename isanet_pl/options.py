"""The options of a run, besides those of network, data and trainer."""

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from isanet_pl.callbacks.dashboards import PredictionPanels
from isanet_pl.callbacks.last_checkpoint import LastCheckpoint
from isanet_pl.callbacks.predictions import PredictionWriter
from isanet_pl.callbacks.progress import Progress
from isanet_pl.callbacks.wandb_run import Mode, WandbRun
from isanet_pl.checkpoints import LINKED_INFERENCE
from isanet_pl.errors import InputError


def add_run_options(parser: LightningArgumentParser) -> None:
    """Adds what a run is called, where it is written and how it goes on."""
    parser.add_argument(
        "--name",
        type=str | None,
        help="Name of the run, a folder in runs_dir; null: the config file's name, or without one "
        "that of the checkpoint's run.",
    )
    parser.add_argument(
        "--runs_dir",
        type=str,
        default="runs",
        help="Where runs are written. A --trainer.logger of your own logs besides; where that "
        "is false, there are neither logs nor a run folder, and checkpoints go to checkpoints/ "
        "in --trainer.default_root_dir.",
    )
    parser.add_argument(
        "--wandb",
        type=Mode,
        default="off",
        help="Log to Weights & Biases as well: offline needs no account (`wandb sync` uploads "
        "later), online needs an API key, auto is online where there is a key and else "
        "offline.",
    )
    parser.add_argument(
        "--resume",
        type=bool,
        default=False,
        help="Continue the last run of this name where it was stopped, in its folder; without "
        "one, start a run. For fit.",
    )
    parser.add_argument(
        "--ema_decay",
        type=float | None,
        help="Average the weights over the steps, keeping this share of the average at each, "
        "such as 0.999; validation and checkpoints then use the average. For fit.",
    )


def add_callback_options(parser: LightningArgumentParser) -> None:
    """Adds the options of what runs beside the training: checkpoints, progress, pictures, files."""
    parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
    parser.set_defaults(
        {
            "checkpoint.monitor": "val/miou",
            "checkpoint.mode": "max",
            "checkpoint.filename": "best",
            "checkpoint.auto_insert_metric_name": False,
            "checkpoint.enable_version_counter": False,
            # Before last.ckpt is written, which remembers the best score.
            "checkpoint.save_on_train_epoch_end": False,
        }
    )
    parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
    parser.add_lightning_class_args(Progress, "progress")
    parser.add_lightning_class_args(PredictionPanels, "panels")
    parser.add_lightning_class_args(WandbRun, "wandb_run")
    parser.add_lightning_class_args(PredictionWriter, "predictions")
    parser.add_argument(
        "--output",
        type=str | None,
        help="Folder that predict writes to; null: predictions in the run folder.",
    )
    parser.link_arguments("output", "predictions.output")
    parser.link_arguments("output", "data.init_args.predict_output")


def link_data(parser: LightningArgumentParser) -> None:
    """Lets flow from the data to the network what a user should not have to type."""
    parser.link_arguments("data.num_classes", "model.network.num_classes", apply_on="instantiate")
    parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
    parser.link_arguments("data.palette", "model.palette", apply_on="instantiate")
    for name in LINKED_INFERENCE:
        parser.link_arguments(f"data.{name}", f"model.inference.{name}", apply_on="instantiate")


def check_trainer_options(config: Any) -> None:
    """Refuses options of a trainer, its checkpoints among them, that cannot be meant.

    Raises:
        InputError: A number of steps is 0, there is no GPU, or see `_check_checkpoint_options`.
    """
    for name in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
        if config.trainer[name] == 0:
            raise InputError(
                f"trainer.{name} must be above 0; --trainer.limit_val_batches 0 leaves "
                "validation out"
            )
    _check_checkpoint_options(config)
    if config.trainer.accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise InputError(
            f"--trainer.accelerator {config.trainer.accelerator}: PyTorch {torch.__version__} "
            "finds no GPU here; take cpu or auto, or install a build of PyTorch for the GPU"
        )


def _check_checkpoint_options(config: Any) -> None:
    """Refuses options by which the best checkpoint would be lost, or share its name with others.

    Raises:
        InputError: The worst one would be kept, or others would take its place.
    """
    checkpoint = config.checkpoint
    if config.trainer.enable_checkpointing is False:
        raise InputError(
            "--trainer.enable_checkpointing false: a run always keeps last.ckpt, to be resumed "
            "from; --checkpoint.save_top_k 0 leaves out the best ones"
        )
    if str(checkpoint.monitor).endswith("loss") and checkpoint.mode == "max":
        raise InputError(
            f"--checkpoint.monitor {checkpoint.monitor} would keep the highest loss: add "
            "--checkpoint.mode min"
        )
    if checkpoint.save_weights_only and config.ema_decay is not None:
        raise InputError(
            "--checkpoint.save_weights_only true leaves out the average of --ema_decay, which was "
            "measured: give one of them"
        )
    if checkpoint.save_last:
        raise InputError(
            "--checkpoint.save_last would write a second last.ckpt over the one that runs go on "
            "from, which is kept anyway"
        )
    kept, name = checkpoint.save_top_k, checkpoint.filename
    numbered = checkpoint.enable_version_counter or name is None or "{" in name
    if checkpoint.save_on_exception and not numbered:
        raise InputError(
            f"--checkpoint.save_on_exception true would write over {name}.ckpt, the best one; "
            "last.ckpt is kept anyway"
        )
    if kept not in (0, 1) and not numbered:
        raise InputError(
            f"--checkpoint.save_top_k {kept} needs a name for each checkpoint, not {name} for all: "
            f"add --checkpoint.filename '{name}-{{step}}'"
        )
