"""The command line: `isanet-pl {fit,validate,test,predict,export}`, a LightningCLI."""

import logging
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelSummary
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only

from isanet_pl import __version__
from isanet_pl.agreement import check_classes
from isanet_pl.callbacks.averaging import ExponentialAverage
from isanet_pl.callbacks.dashboards import ClassScores
from isanet_pl.callbacks.predictions import PredictionWriter
from isanet_pl.callbacks.progress import ProgressBar
from isanet_pl.callbacks.ranks import RankWatch
from isanet_pl.callbacks.results import ResultTable
from isanet_pl.callbacks.run_config import RunConfig
from isanet_pl.callbacks.summary import NetworkSummary
from isanet_pl.callbacks.wandb_run import resolve_mode, wandb_logger
from isanet_pl.checkpoint_io import AtomicCheckpointIO
from isanet_pl.checkpoints import check_file, is_onnx, with_config_of_checkpoint
from isanet_pl.data import SegmentationDataModule
from isanet_pl.data.files import IGNORE
from isanet_pl.errors import InputError, find_input_error
from isanet_pl.explain import explain, less_memory, out_of_memory
from isanet_pl.exported import OnnxNetwork
from isanet_pl.hardware import precision_in_hardware
from isanet_pl.messages import configure_messages
from isanet_pl.module import SegmentationModule
from isanet_pl.options import (
    add_callback_options,
    add_run_options,
    check_trainer_options,
    link_data,
)
from isanet_pl.resume import continue_metrics, find_run
from isanet_pl.run_folder import name_of_run, new_run_folder, remove_if_empty
from isanet_pl.trainer import SegmentationTrainer

log = logging.getLogger(__name__)

TRAINED = ("validate", "test", "predict", "export")
"""Commands that need trained weights."""


class SegmentationCLI(LightningCLI):
    """Builds data, network and trainer from a config and runs one of the commands."""

    resumed: Path | None = None
    """The folder of the run that goes on, if there is one."""
    claimed: Path | None = None
    """The folder of a new run, on the first process."""

    def __init__(self, *classes: Any, **options: Any) -> None:
        args: ArgsType = options.get("args")
        self.given = sys.argv[1:] if args is None else args
        self.command = self.given[0] if isinstance(self.given, list) and self.given else None
        super().__init__(*classes, **options)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Returns the parser of a command, without options where another command was given.

        To add the options of all five takes half a second.
        """
        if self.command == subcommand or self.command not in self.subcommands():
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of a run, and what flows from the data to the network."""
        add_run_options(parser)
        add_callback_options(parser)
        link_data(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments; a checkpoint without a config is its own config.

        Raises:
            InputError: The file is no checkpoint.
        """
        given = self.given
        if isinstance(given, list) and self.command in TRAINED:
            given = with_config_of_checkpoint(given)
        self.config = (
            parser.parse_args(given) if isinstance(given, list) else parser.parse_object(given)
        )

    def _parse_ckpt_path(self) -> None:
        """Leaves the config alone.

        Lightning's own version lets a checkpoint's hyper-parameters override config and command
        line without a word. Here these two say what is built, and
        `SegmentationModule.on_load_checkpoint` refuses a checkpoint that disagrees.
        """

    def instantiate_classes(self) -> None:
        """Builds everything; without pretrained weights where a checkpoint brings its own.

        Raises:
            InputError: A checkpoint is needed, the named one does not exist, or a class refuses one
                of its arguments.
        """
        if self.subcommand is None:
            return super().instantiate_classes()
        config = self.config[self.subcommand]
        given = config.ckpt_path
        if config.resume:
            self._continue_run(config)
        checkpoint = config.ckpt_path
        if checkpoint is None:
            if self.subcommand != "fit":
                raise InputError(f"{self.subcommand} needs trained weights: --ckpt_path FILE")
        else:
            check_file(checkpoint, self.subcommand)
        ignored = config.model.loss.ignore_index
        if ignored != IGNORE:
            raise InputError(
                f"model.loss.ignore_index is {ignored}, but pixels without a label come from the "
                f"data as {IGNORE}, whatever their code in the files"
            )
        network = config.model.network
        wanted = network.weights_path, network.pretrained
        if checkpoint is not None:
            network.weights_path, network.pretrained = None, False
        try:
            super().instantiate_classes()
        except (ValueError, FileNotFoundError) as error:
            # An argument that a class refuses. jsonargparse wraps it into its own message.
            raise find_input_error(error) or InputError(str(error)) from error
        # The run's config.yaml, written later, keeps what the user asked for.
        network.weights_path, network.pretrained = wanted
        config.ckpt_path = given

    def _continue_run(self, config: Any) -> None:
        """Makes the last run of the config's name, if there is one, the one to continue.

        Raises:
            InputError: Something else is asked for as well, or the run's checkpoints are damaged.
        """
        # It says how this process began: a config.yaml with it could not be used for anything else.
        config.resume = False
        if self.subcommand != "fit":
            raise InputError(f"--resume is for fit, not for {self.subcommand}")
        if config.trainer.logger is False:
            raise InputError(
                "--resume needs the run folder, which --trainer.logger false leaves out"
            )
        if config.ckpt_path is not None:
            raise InputError(
                "--resume continues a run in its folder, --ckpt_path starts a new one from a "
                f"checkpoint: give one of them, not both (--ckpt_path {config.ckpt_path})"
            )
        found = find_run(config.runs_dir, self._run_name(config))
        if found is None:
            log.info("there is no run to resume: starting one")
            return
        self.resumed, checkpoint = found
        config.ckpt_path = str(checkpoint)
        log.info("resuming from %s", checkpoint)

    @staticmethod
    def _run_name(config: Any) -> str:
        """Returns the name of the run, and puts it into the config."""
        if config.name is None:
            files = [str(file) for file in config.config or [] if file is not None]
            if files:
                config.name = Path(files[0]).stem
            elif config.ckpt_path is not None:
                config.name = name_of_run(Path(config.ckpt_path), Path(config.runs_dir))
            else:
                config.name = "unnamed"
        return str(config.name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Returns the trainer, logging to a new run folder, and to the config's loggers as well.

        Raises:
            InputError: Options of the trainer do not go together, or not with this machine.
        """
        config = self.config.get(str(self.subcommand), self.config)
        # What may be refused comes before there is a run folder, as far as it is known by then.
        if self.subcommand in ("validate", "test", "predict"):
            self._use_exported(self.subcommand)
        check_trainer_options(config)
        averages = config.ema_decay is not None and self.subcommand == "fit"
        average = ExponentialAverage(config.ema_decay) if averages else None
        chosen = self._get(self.config_init, "trainer")
        kwargs["callbacks"] = _with_displays(chosen)
        given = chosen["logger"]
        more = given if isinstance(given, list) else [] if given in (None, True) else [given]
        try:
            if config.trainer.fast_dev_run or self.subcommand == "export":
                kwargs["logger"] = False
            elif given is not False and self.subcommand is not None:
                # First our own, which says where the run folder is.
                kwargs["logger"] = [*self._loggers(config), *more]
            trainer = super().instantiate_trainer(**kwargs)
            _check_processes(trainer, config)
        except Exception:
            if self.claimed is not None:
                remove_if_empty(self.claimed)
            raise
        _complete(trainer, average)
        _warn_of_emulation(trainer)
        return trainer

    def _loggers(self, config: Any) -> list[Logger]:
        name = self._run_name(config)
        wandb = resolve_mode(config.wandb)
        # Only the first process writes, so only it may claim a folder.
        first = getattr(rank_zero_only, "rank", 0) == 0
        if self.resumed is not None:
            version = self.resumed.name
        else:
            self.claimed = new_run_folder(config.runs_dir, name) if first else None
            version = "version_0" if self.claimed is None else self.claimed.name
        # Written at once, so that a killed run leaves all of its metrics.
        csv = CSVLogger(config.runs_dir, name, version, flush_logs_every_n_steps=1)
        if self.resumed is not None and first:
            continue_metrics(csv, config.ckpt_path)
        loggers: list[Logger] = [csv]
        if wandb is not None:
            continued = config.ckpt_path if self.subcommand == "fit" else None
            title, folder = f"{name}-{version}", Path(csv.log_dir)
            loggers.append(wandb_logger(wandb, title, folder, str(self.subcommand), continued))
        return loggers

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the commands, and which of their arguments are no options."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command.

        Raises:
            InputError: Something the user gave is wrong, or the memory does not suffice.
        """
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, MemoryError) as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
            fixes = less_memory(subcommand, self.config[subcommand])
            raise InputError(f"{reason}; {fixes}") from error

    def before_validate(self) -> None:
        """Leaves the table at the end to `ResultTable`; Lightning would print its own as well."""
        self.config_init["validate"]["verbose"] = False

    def before_test(self) -> None:
        """Leaves the table at the end to `ResultTable`; Lightning would print its own as well."""
        self.config_init["test"]["verbose"] = False

    def _use_exported(self, command: str) -> None:
        """Puts an exported network in the place of the module's, if one was given.

        Raises:
            InputError: It was trained for other classes than those of the data.
        """
        path = self.config_init[command]["ckpt_path"]
        if is_onnx(path):
            network = OnnxNetwork(Path(path))
            check_classes(network.class_names, self.model.class_names)
            self.model.network = network
            self.config_init[command]["ckpt_path"] = None

    def before_predict(self) -> None:
        """Keeps Lightning from gathering all predictions in memory; they are written one by one."""
        self.config_init["predict"]["return_predictions"] = False
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter):
                callback.checkpoint = Path(self.config["predict"]["ckpt_path"])


def _check_processes(trainer: Trainer, config: Any) -> None:
    """Refuses what several processes cannot do, or not those that a launcher has started.

    Raises:
        InputError: See above.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    if trainer.world_size == 1 and rank > 0:
        # Each would train for itself, and all but the first in a folder that is not theirs.
        raise InputError(
            f"a launcher has started this process as number {rank} of several, but "
            f"--trainer.devices {config.trainer.devices} --trainer.num_nodes "
            f"{config.trainer.num_nodes} are a single one: give as many devices as a machine "
            "has processes"
        )
    if trainer.world_size > 1 and trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        raise InputError(
            f"trainer.val_check_interval {config.trainer.val_check_interval}: with several "
            "devices, give a number of steps; each would look at its own clock, and they "
            "would wait for each other"
        )


def _complete(trainer: Trainer, average: ExponentialAverage | None) -> None:
    """Gives a trainer what its own arguments cannot."""
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (
            isinstance(callback, EarlyStopping)
            and callback.monitor.startswith("val/")
            and callback._check_on_train_epoch_end is None
        ):
            # Before last.ckpt is written: a run that goes on from there has no scores yet.
            callback._check_on_train_epoch_end = False
    if average is not None:
        # First: others then find the average of this step, not of the one before.
        trainer.callbacks.insert(0, average)  # type: ignore[attr-defined]


def _warn_of_emulation(trainer: Trainer) -> None:
    device = trainer.strategy.root_device
    precision = precision_in_hardware(trainer.precision, device)
    if precision != trainer.precision and trainer.is_global_zero:
        log.warning(
            "this %s has no instructions for bfloat16: --trainer.precision %s is several times "
            "as fast as %s",
            *("GPU" if device.type == "cuda" else "CPU", precision, trainer.precision),
        )


def _with_displays(trainer: Any) -> list[Callback]:
    """Returns a config's callbacks, and bar and summary where wanted and not among them."""
    given = trainer["callbacks"]
    callbacks = given if isinstance(given, list) else [] if given is None else [given]
    for option, kind, own in (
        ("enable_progress_bar", LightningBar, ProgressBar),
        ("enable_model_summary", ModelSummary, NetworkSummary),
    ):
        among_them = any(isinstance(callback, kind) for callback in callbacks)
        if trainer[option] is not False and not among_them:
            callbacks = [*callbacks, own()]
    return callbacks


def main(args: ArgsType = None, run: bool = True) -> SegmentationCLI:
    """Runs the command line and returns it, with its `trainer`, `model` and `datamodule`.

    Args:
        args: Arguments; None takes those of the process.
        run: False builds everything and runs nothing; there is no sub-command then.

    Raises:
        InputError: Something the user gave is wrong.
        SystemExit: The arguments do not parse.
    """
    configure_messages()
    try:
        return _build_and_run(args, run)
    except InputError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        raise explained from error


def _build_and_run(args: ArgsType, run: bool) -> SegmentationCLI:
    return SegmentationCLI(
        SegmentationModule,
        SegmentationDataModule,
        args=args,
        save_config_callback=RunConfig,
        save_config_kwargs={"overwrite": True},  # by a run that is resumed
        trainer_class=SegmentationTrainer,
        run=run,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={
            "callbacks": [ResultTable(), ClassScores(), RankWatch()],
            # Not all that there are: a step would see as many times the images of the recipe.
            "devices": 1,
            "log_every_n_steps": 10,
            "max_epochs": -1,
        },
        parser_kwargs={
            "description": "ISANet: interlaced sparse self-attention. Train with `isanet-pl fit "
            "--config configs/quickstart.yaml`; options of a data set: `isanet-pl fit --data.help "
            "CamVid`.",
            "version": __version__,
        },
    )
