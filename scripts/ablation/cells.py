"""The cells of an ablation: one setting with one seed, what is there of it, and its process."""

import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from reporting.labels import NO_DIFFERENCE, starts

from isanet_pl.callbacks.run_config import flatten
from isanet_pl.cli import main as isanet_pl_main
from isanet_pl.errors import InputError
from isanet_pl.resume import find_run
from isanet_pl.run_folder import run_folders

STEP = re.compile(rb"^step (\d+)/(\d+) ", re.MULTILINE)
"""A line of progress in the log of a run."""
TAIL_BYTES = 2**16
"""End of a log that is searched for the last such line."""


class CellInUse(Exception):
    """Another process runs the cell."""


@dataclass(frozen=True)
class Found:
    """What earlier starts left of a cell.

    Attributes:
        finished: Whether a run has.
        miou: Of its last validation, as a fraction; None where nothing was labelled.
        code: The git commit that the run was made with; None: unknown.
        checkpoint: What a run that was stopped goes on from, if none has finished.
    """

    finished: bool = False
    miou: float | None = None
    code: str | None = None
    checkpoint: Path | None = None

    def __str__(self) -> str:
        return "no val mIoU" if self.miou is None else f"{self.miou:.2%} val mIoU"


@dataclass(frozen=True)
class Cell:
    """One setting with one seed; its runs are OUTPUT/SETTING/seedN/version_M.

    Args:
        setting: Stems of its overlays, joined by `+`, or `base`.
        seed: Seed of the run.
        output: Folder of the whole grid.
        configs: Config files, merged from left to right.
        options: Further options of `isanet-pl fit`.
    """

    setting: str
    seed: int
    output: Path
    configs: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns the run's name, a folder in `output`."""
        return f"{self.setting}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Returns the folder of the cell's runs."""
        return self.output / self.name

    @property
    def log(self) -> Path:
        """Returns the file that the cell's processes print to."""
        return self.folder.with_suffix(".log")

    @property
    def tags(self) -> dict[str, str]:
        """Returns the environment that W&B reads: the grid is a group, overlays and seed tags."""
        names = [*self.setting.split("+"), f"seed{self.seed}"]
        return {"WANDB_RUN_GROUP": self.output.resolve().name, "WANDB_TAGS": ",".join(names)}

    def arguments(self, resume: bool = False) -> list[str]:
        """Returns the arguments of `isanet-pl`; with `resume` those that go on with a run."""
        configs = [part for path in self.configs for part in ("--config", path)]
        own = ["--seed_everything", str(self.seed), "--runs_dir", str(self.output)]
        own += ["--name", self.name, *(["--resume", "true"] if resume else [])]
        return ["fit", *configs, *self.options, *own]

    def command(self, resume: bool) -> list[str]:
        """Returns the command of the process."""
        return [sys.executable, "-m", "isanet_pl", *self.arguments(resume)]

    def shell_line(self, resume: bool) -> str:
        """Returns what one would type instead."""
        tags = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.tags.items())
        return f"{tags} {shlex.join(self.command(resume))}"

    def resolve(self) -> dict[str, Any]:
        """Returns the whole config that the cell stands for, as a run would save it.

        Raises:
            InputError: Files and options do not make a config.
        """
        return _resolve(self.name, self.arguments())

    def find(self, config: Mapping[str, Any]) -> Found:
        """Returns what is there of the cell.

        Args:
            config: What `resolve` returned.

        Raises:
            InputError: A run was made with another config, or its checkpoints are damaged.
        """
        for run in run_folders(self.folder):
            result = _result_of_fit(run)
            if result is not None:
                self._check_same(run, config)
                return Found(True, result["scores"]["miou"], result.get("git"))
        stopped = find_run(str(self.output), self.name)
        if stopped is None:
            return Found()
        run, checkpoint = stopped
        self._check_same(run, config)
        return Found(checkpoint=checkpoint)

    def _check_same(self, run: Path, config: Mapping[str, Any]) -> None:
        path = run / "config.yaml"
        changes = _changes(yaml.safe_load(path.read_text("utf-8")), config)
        if changes:
            # Options that are newer than the run had their defaults.
            changes = _changes(_resolve(str(path), ["fit", "--config", str(path)]), config)
        if changes:
            raise InputError(
                f"{run} was run with another config than {self.name} has now; delete "
                f"{self.folder} to run it anew, or choose another --output:\n  "
                + "\n  ".join(changes)
            )


class Attempt:
    """A running process of a cell. Everything it prints goes to the end of the cell's log.

    Args:
        cell: What it runs.
        config: What `Cell.resolve` returned.
        environment: Variables on top of those of this process.

    Attributes:
        found: What was there of the cell. If it had finished, no process is started.

    Raises:
        CellInUse: Another process runs the cell.
    """

    def __init__(
        self, cell: Cell, config: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self.cell = cell
        self.process: subprocess.Popen[bytes] | None = None
        self.first: float | None = None
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("ab") as log:
            try:
                # The run inherits the open file and with it the lock, and keeps it for as long as
                # it lives, even if this process is killed.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CellInUse from None
            except OSError as error:
                raise InputError(
                    f"cannot lock {cell.log}, which keeps two processes off one run: "
                    f"{error.strerror}; choose an --output on a file system with locks"
                ) from error
            self.found = cell.find(config)
            if self.found.finished:
                return
            self.begin = log.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                cell.command(resume=self.found.checkpoint is not None),
                env={**os.environ, **cell.tags, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C here is passed on once, by `stop`
            )

    def exit_code(self) -> int | None:
        """Returns the exit code of the process; None while it runs."""
        return 0 if self.process is None else self.process.poll()

    def progress(self) -> tuple[float, float]:
        """Returns which share of the run's steps was done when this attempt began, and is now."""
        with self.cell.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self.begin, end - TAIL_BYTES))
            lines = STEP.findall(log.read())
        shares = [int(step) / int(total) for step, total in lines if int(total)]
        if shares and self.first is None:
            self.first = shares[0] if self.found.checkpoint else 0.0
        return (self.first or 0.0, shares[-1] if shares else self.first or 0.0)

    def last_lines(self, count: int = 5) -> list[str]:
        """Returns the end of what the process printed."""
        text = self.cell.log.read_bytes()[self.begin :].decode("utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def stop(attempts: Sequence[Attempt], seconds: float = 30) -> None:
    """Asks running processes to save and end, and kills what is left of them after some seconds.

    A Ctrl-C meanwhile kills them at once.
    """
    processes = [attempt.process for attempt in attempts if attempt.process is not None]
    for process in processes:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.wait(seconds)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its loader and DDP processes
        process.wait()


def _result_of_fit(run: Path) -> dict[str, Any] | None:
    """Returns the record of a finished fit; `test` and `validate` leave one as well."""
    try:
        record: dict[str, Any] = json.loads((run / "results.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # there is none, or none that is whole: it goes on
        return None
    return record if record["command"].startswith("isanet-pl fit ") else None


def _resolve(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the whole config that arguments of `isanet-pl` make; see `Cell.resolve`."""
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            isanet_pl_main([*arguments, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            reason = complaint.getvalue().rpartition("\nerror: ")[2].strip()
            raise InputError(f"{name} has no valid config: {reason}") from stop
    config: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return config


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns a line for each option that differs and can change what a run finds."""
    before, after = flatten(old), flatten(new)
    for config in (before, after):
        if config.get("trainer.devices") == "auto":  # the default before it was 1
            config["trainer.devices"] = 1  # a cell sees no other device
    keys = [key for key in sorted(before.keys() | after.keys()) if matters(key)]
    pairs = [(key, before.get(key), after.get(key)) for key in keys]
    return [f"{key}: then {then}, now {now}" for key, then, now in pairs if then != now]


def matters(key: str) -> bool:
    """Returns whether an option, by its dotted key, can change what a run of some seed finds."""
    return key == "seed_everything" or not starts(key, NO_DIFFERENCE)
