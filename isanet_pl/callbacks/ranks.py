"""Several processes of one run: none waits for ever for one that has died."""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

log = logging.getLogger(__name__)

GRACE_SECONDS = 5
"""How long a process may take to end by itself once the first one has."""
HINT = "fit goes on from the last checkpoint with --resume true, also on another number of devices"


class RankWatch(pl.Callback):
    """Watches the processes that Lightning has started, and these the one that started them.

    A process that waits for another in a collective operation of a GPU learns of its death only
    after half an hour. torchrun watches its own, and so does srun with --kill-on-bad-exit.
    """

    def __init__(self) -> None:
        self._ended = False
        # Now, at the start of the process: the first one may have died by the time of `setup`.
        self._born = os.getpid(), os.getppid()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts to watch."""
        strategy = trainer.strategy
        environment = getattr(strategy, "cluster_environment", None)
        if trainer.world_size == 1 or not isinstance(environment, LightningEnvironment):
            return
        children = getattr(strategy.launcher, "procs", [])
        process, parent = self._born
        if process != os.getpid():  # a fork of the one that this was made in
            parent = os.getppid()
        self._ended = False
        watched = parent if trainer.local_rank > 0 else None
        arguments = children, watched, lambda: self._ended
        threading.Thread(target=watch, args=arguments, name="rank-watch", daemon=True).start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stops watching: the processes may end one after the other."""
        self._ended = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stops watching in a process that ends by itself; the others go on."""
        self._ended = True


def watch(
    children: Sequence[subprocess.Popen[bytes]], parent: int | None, ended: Callable[[], bool]
) -> None:
    """Returns when the run has ended, or once it has said that one of its processes has died.

    Args:
        children: Those that this process has started, ranks 1, 2, ...: Lightning ends this one
            within seconds of their death.
        parent: The process that has started this one, without which it ends; None: not watched.
        ended: Returns whether the run has ended.
    """
    while not ended():
        time.sleep(1)
        for rank, child in enumerate(children, 1):
            code = child.poll()
            if code is not None and code < 0:  # one that ends with an error has said so itself
                how = signal.Signals(-code).name
                log.error("rank %d was killed by %s: the run ends; %s", rank, how, HINT)
                return
        if parent is not None and os.getppid() != parent:
            time.sleep(GRACE_SECONDS)
            if ended():
                return  # both have failed, and this one can say why
            log.error("rank 0 has died: the run ends; %s", HINT)
            os._exit(1)
