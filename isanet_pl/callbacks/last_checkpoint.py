"""`last.ckpt`, from which an interrupted run goes on, and the signals that ask for it."""

import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from isanet_pl.checkpoint_io import PART
from isanet_pl.errors import InputError
from isanet_pl.run_folder import CHECKPOINTS, run_folder

log = logging.getLogger(__name__)

LAST = "last.ckpt"
ASK_EVERY = 10
"""Steps after which processes ask each other whether one was told to stop: they wait for it."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM has ended, by convention."""


def terminated(trainer: pl.Trainer) -> SIGTERMException:
    """Returns what ends this process as SIGTERM has asked for."""
    # Lightning kills the first process within seconds of any other's that ends with an error,
    # however much it has yet to do, such as an upload.
    return SIGTERMException(TERMINATED if trainer.is_global_zero else 0)


def random_state() -> dict[str, Any]:
    """Returns the states of this process's random numbers, in types that a checkpoint may hold."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # the one that everyone shares
    kind, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        # On a CPU beside a GPU, to ask would take memory of the GPU.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Goes back to what `random_state` returned; those of a device that is not there are left."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a run goes on as if it had never stopped.

    It is written every few steps, after each validation, at the end, and when SIGTERM, or the
    signal with which SLURM announces it, asks the process to end.

    Args:
        every_n_steps: Optimiser steps between two writes: no more can be lost.

    Raises:
        InputError: `every_n_steps` is below 1.
    """

    # Not ModelCheckpoint, which also writes between a step and its validation. A run that goes on
    # from there leaves that validation out, and with it, perhaps, its best checkpoint.

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise InputError(f"last_checkpoint.every_n_steps must be 1 or more: {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.step = 0  # optimiser steps at the end of the last batch
        self.stepped = False  # whether that batch ended one, so that no gradients are pending
        self.validated = False  # whether there was a validation since that batch
        self.overdue = False  # whether a validation came while gradients were pending
        self.saved_step = -1
        self.asked_to_stop = False  # this process
        self.asked_to_requeue = False  # this process
        self.stopping = False  # all processes
        self.requeueing = False  # all processes
        self._random: dict[str, Any] | None = None
        self._requeue: Callable[[], Any]

    def state_dict(self) -> dict[str, Any]:
        """Returns the random numbers that go on after this checkpoint, and where in a step it is.

        `mid_step`: gradients of a step that has begun, which no checkpoint holds, were pending.
        `validated`: a validation came between the step and the checkpoint.
        """
        return {
            "random": random_state(),
            "mid_step": not self.stepped,
            "validated": self.validated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the random numbers until training starts."""
        self._random = state_dict["random"]

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return (run_folder(trainer) or Path(trainer.default_root_dir)) / CHECKPOINTS

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses what training cannot go on from; knows the best checkpoint of a moved run.

        Raises:
            InputError: The checkpoint holds the state of another optimiser, or an average of the
                weights, which would be lost.
        """
        if trainer.state.fn != "fit":
            return
        saved = _optimizer(checkpoint["hyper_parameters"])
        own = _optimizer(pl_module.hparams)
        if saved != own:
            raise InputError(
                f"model.optimizer: checkpoint {saved}, config {own}; go on with the same one"
            )
        averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if "averaging_state" in checkpoint and not averaging:
            raise InputError(
                f"{trainer.ckpt_path} comes from a run that averages its weights: continue it with "
                "its --ema_decay"
            )
        folder = self._folder(trainer)
        same = Path(str(trainer.ckpt_path)).parent.resolve() == folder.resolve()
        # Only the first process knows the folder: what the others do must not depend on theirs.
        if trainer.strategy.broadcast(same):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    _relocate(checkpoint["callbacks"].get(callback.state_key, {}), callback.dirpath)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses to write over another run's checkpoints, where runs have no folders of their own.

        Raises:
            InputError: `last.ckpt` is there, and is not what this run goes on from.
        """
        there = self._folder(trainer) / LAST
        if run_folder(trainer) is not None or trainer.fast_dev_run or not there.exists():  # type: ignore[attr-defined]
            return
        if (
            trainer.ckpt_path is None
            or Path(trainer.ckpt_path).parent.resolve() != there.parent.resolve()
        ):
            raise InputError(
                f"{there.parent} holds the checkpoints of another run, and --trainer.logger false "
                "leaves this one without a folder of its own: move them away, or give another "
                "--trainer.default_root_dir"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes up the random numbers, and listens for SIGTERM from here on.

        Raises:
            SIGTERMException: It came before.
        """
        if self._random is not None:
            restore_random_state(self._random)
        self.step = trainer.global_step
        loop = trainer.fit_loop
        epoch = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epoch.ready == epoch.processed:  # type: ignore[attr-defined]
            # Saved at an epoch's last batch: Lightning 2.6 has just counted the epoch as done, but
            # would not count the start of the next one, and a second resume would begin that anew.
            loop.reset_restart_stage()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._tidy(self._folder(trainer))
        if trainer.received_sigterm:
            raise terminated(trainer)
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            # In the place of Lightning's, which talks to the other processes at once, whatever they
            # are doing, and ends without saving. Lightning puts back what was there before its own.
            signal.signal(signal.SIGTERM, self._ask_to_stop)
            self._listen_to_slurm(trainer)

    def _listen_to_slurm(self, trainer: pl.Trainer) -> None:
        """Takes the place of Lightning's handler of the signal that comes before the time is over.

        By itself it saves in the middle of whatever is being done: a validation would go on with
        its other half alone.
        """
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            number = environment.requeue_signal
            assert number is not None
            usual = signal.getsignal(number)
            assert callable(usual)
            self._requeue = lambda: usual(number, None)
            signal.signal(number, self._ask_to_requeue)

    @staticmethod
    @rank_zero_only
    def _tidy(folder: Path) -> None:
        """Makes the folder, and removes what a killed process has left half written."""
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(f"*{PART}"):
            part.unlink()

    def _ask_to_stop(self, signal_number: int, frame: Any) -> None:
        self.asked_to_stop = True

    def _ask_to_requeue(self, signal_number: int, frame: Any) -> None:
        self.asked_to_stop = self.asked_to_requeue = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the process if it was asked to, once everything about the last step is done.

        Raises:
            SIGTERMException: With exit code 143, in the first process.
        """
        if not self.stopping or self.saved_step != trainer.global_step:
            return
        if trainer.is_global_zero:
            log.warning(
                "%s: stopped after step %d, saved in %s; %s",
                "SLURM's signal" if self.requeueing else "SIGTERM",
                trainer.global_step,
                self._folder(trainer),
                "the job is queued again"
                if self.requeueing
                else "--resume true goes on from there",
            )
        raise terminated(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves, if it is time to and the step has no validation to come."""
        self.stepped, self.step = trainer.global_step != self.step, trainer.global_step
        self.validated = False
        loop = trainer.fit_loop
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        ends = self.step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
        ends = ends or (trainer.should_stop and loop._can_stop_early)  # its time is over
        due = ends or self.step % self.every_n_steps == 0
        if due or trainer.world_size == 1 or self.step % ASK_EVERY == 0:
            self._agree_on_stopping(trainer)
        due = due or self.stopping or self.overdue
        if due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self._save(trainer)

    def _agree_on_stopping(self, trainer: pl.Trainer) -> None:
        decide = trainer.strategy.reduce_boolean_decision
        self.stopping = decide(self.asked_to_stop, all=False)
        if self.stopping:
            self.requeueing = decide(self.asked_to_requeue, all=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves, after the best checkpoint."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validated, self.overdue = True, not self.stepped
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if self.stepped and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._folder(trainer) / LAST, weights_only=False)
            self.saved_step, self.overdue = trainer.global_step, False
            if self.requeueing:
                self._requeue()  # saves once more, where Lightning looks for it

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Says what a run that fails has kept."""
        failed = isinstance(exception, Exception)  # not SIGTERM or Ctrl-C
        if failed and self.saved_step >= 0 and trainer.is_global_zero:
            log.warning(
                "the last good checkpoint is of step %d: %s",
                self.saved_step,
                self._folder(trainer) / LAST,
            )


def _optimizer(arguments: Mapping[str, Any]) -> str | None:
    """Returns the class of the optimiser that a config describes; None where Python made it."""
    optimizer = arguments.get("optimizer")
    return str(optimizer["class_path"]) if isinstance(optimizer, Mapping) else None


def _relocate(state: dict[str, Any], folder: Any) -> None:
    """Makes the state of a ModelCheckpoint that of one in another folder.

    Otherwise it would take the next validation for the first, and so for the best.
    """
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if state.get(key):
            state[key] = _in(folder, state[key])
    if "best_k_models" in state:
        best = state["best_k_models"].items()
        state["best_k_models"] = {_in(folder, path): score for path, score in best}
        state["dirpath"] = folder


def _in(folder: Any, path: str) -> str:
    # Not Path, which drops a leading "./": ModelCheckpoint compares names as they are written, and
    # takes the file that it has just written for an old one under another name.
    return os.path.join(folder, Path(path).name)  # noqa: PTH118
