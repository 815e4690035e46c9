"""Runs a grid of overlays and seeds, each cell a run of its own, and compares them.

python scripts/ablate.py --config configs/quickstart.yaml --overlays configs/ablation/order_*.yaml
python scripts/ablate.py ... --jobs 2 -- --data.root data/camvid    options of every run

Started again, it leaves out what has finished and resumes what was stopped. Exit codes: 0 when
every cell has finished, 1 when some have failed, 2 for a wrong command line, 130 after Ctrl-C.
"""

import argparse
import os
import shlex
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation.cells import Attempt, Cell, CellInUse, Found, stop
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from isanet_pl.callbacks.results import code_version
from isanet_pl.errors import InputError
from isanet_pl.hardware import num_cores

OURS = ("--config", "-c", "--seed_everything", "--runs_dir", "--name", "--ckpt_path", "--resume")
"""Options of a run that this script sets."""
POLL_SECONDS = 0.5
LINE_SECONDS = 60
"""Between two lines of progress where there is no terminal."""
Configs = Mapping[Cell, Mapping[str, Any]]


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Returns the options; `options` are those of the runs, behind `--`.

    Raises:
        SystemExit: The command line is wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="config of the base; of several, the first names --output",
    )
    add("--overlays", nargs="+", default=[], metavar="FILE", help="one setting each; a+b for both")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of every setting")
    add("--base", action=argparse.BooleanOptionalAction, default=True, help="run the base as well")
    add("--jobs", type=int, default=1, help="runs at a time; they share the cores, or the GPUs")
    add("--output", type=Path, help="default: runs/ablation_BASE")
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    at = args.index("--") if "--" in args else len(args)
    options = parser.parse_args(args[:at])
    options.options = tuple(args[at + 1 :])
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    for name in (part.split("=")[0] for part in options.options):
        if name in OURS:
            parser.error(f"{name} is set for each run: it cannot stand behind --")
    options.output = options.output or Path("runs", f"ablation_{Path(options.config[0]).stem}")
    return options


def plan(options: argparse.Namespace) -> list[Cell]:
    """Returns the cells, seed by seed, so that an early table compares all settings.

    Raises:
        InputError: There are none, two have the same name, or a config file does not exist.
    """
    overlays: dict[str, tuple[str, ...]] = {"base": ()} if options.base else {}
    for given in options.overlays:
        files = tuple(given.split("+"))
        name = "+".join(Path(file).stem for file in files)
        if name in overlays or name == "base":
            raise InputError(f"two settings are named {name}: --overlays {given}; rename the file")
        overlays[name] = files
    for file in [*options.config, *(file for files in overlays.values() for file in files)]:
        if not Path(file).is_file():
            raise InputError(f"no such config: {file}; those of this project are in configs/")
    if not overlays:
        raise InputError("nothing to run: give --overlays FILE ..., or leave out --no-base")
    return [
        Cell(name, seed, options.output, (*options.config, *files), options.options)
        for seed in dict.fromkeys(options.seeds)
        for name, files in overlays.items()
    ]


def share_of_machine(slot: int, jobs: int, trainer: Mapping[str, Any]) -> dict[str, str]:
    """Returns the environment that gives the run in a slot its GPUs and its share of the cores.

    Args:
        slot: Of the run.
        jobs: Runs at a time.
        trainer: Of the run's config.
    """
    share = {"OMP_NUM_THREADS": str(max(1, num_cores() // jobs))} if jobs > 1 else {}
    if torch.cuda.is_available() and trainer["accelerator"] != "cpu":
        devices = str(trainer["devices"])
        if devices != "auto" and not (devices.isdigit() and int(devices)):
            return share  # it names those it wants, or wants all
        count = 1 if devices == "auto" else int(devices)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        first = slot % max(1, len(gpus) // count) * count
        share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + count])
    return share


class Grid:
    """Runs cells, some at a time.

    Args:
        configs: The cells and their whole configs.
        jobs: Runs at a time.
        say: Told of each event, in one line.

    Attributes:
        finished: What cells reached.
        failures: Why others have not finished, by their names.
    """

    def __init__(self, configs: Configs, jobs: int, say: Callable[[str], None]) -> None:
        self.configs = configs
        self.jobs = jobs
        self.say = say
        self.waiting: deque[Cell] = deque()
        self.running: dict[int, Attempt] = {}
        self.finished: dict[Cell, Found] = {}
        self.failures: dict[str, list[str]] = {}
        self.start = time.monotonic()
        self.work = 0.0
        """Runs done since the start, in whole runs."""

    def run(self, show: Callable[[str, float], None]) -> None:
        """Runs everything; what is running stops with it, resumable, if this is interrupted.

        Args:
            show: Told now and then how it stands, in words and as a share.
        """
        for cell, config in self.configs.items():
            found = cell.find(config)
            if found.finished:
                self._note(cell, found, "has finished, ")
            else:
                self.waiting.append(cell)
        try:
            while self.waiting or self.running:
                for slot in set(range(self.jobs)) - self.running.keys():
                    self._start_next(slot)
                show(*self.status())
                time.sleep(POLL_SECONDS if self.running else 0)
                for slot, attempt in list(self.running.items()):
                    if attempt.exit_code() is not None:
                        self._finish(self.running.pop(slot))
        finally:
            stop(list(self.running.values()))

    def _start_next(self, slot: int) -> None:
        while self.waiting:
            cell = self.waiting.popleft()
            try:
                config = self.configs[cell]
                share = share_of_machine(slot, self.jobs, config["trainer"])
                attempt = Attempt(cell, config, share)
            except CellInUse:
                self.say(f"{cell.name}: left out, another process runs it")
                self.failures[cell.name] = ["another process runs it"]
                continue
            except InputError as error:  # another process has run it meanwhile, otherwise
                self._fail(cell, str(error))
                continue
            if attempt.process is None:
                self._note(cell, attempt.found, "has finished, ")
                continue
            resumed = attempt.found.checkpoint
            self.say(f"{cell.name}: " + (f"resumes from {resumed}" if resumed else "starts"))
            self.running[slot] = attempt
            return

    def _finish(self, attempt: Attempt) -> None:
        cell, code = attempt.cell, attempt.exit_code()
        first, now = attempt.progress()
        self.work += now - first
        try:
            found = cell.find(self.configs[cell])
        except InputError as error:  # its files were edited, or the code, before it started
            self._fail(cell, str(error))
            return
        if code == 0 and found.finished:
            self._note(cell, found)
            return
        reason = f"exit code {code}; the end of {cell.log}:"
        if code == 0:
            reason = (
                "it left no result, as where --trainer.val_check_interval lets it end without a "
                f"validation; to run it anew, delete {cell.folder}. {cell.log} ends:"
            )
        self._fail(cell, reason, *attempt.last_lines())

    def _note(self, cell: Cell, found: Found, how: str = "") -> None:
        self.finished[cell] = found
        self.say(f"{cell.name}: {how}{found}")

    def _fail(self, cell: Cell, *reason: str) -> None:
        self.failures[cell.name] = list(reason)
        self.say(f"{cell.name}: failed, see below")

    def status(self) -> tuple[str, float]:
        """Returns how far everything is and how long it takes yet, and the share that is done."""
        shares = {a.cell.name: a.progress() for a in self.running.values()}
        work = self.work + sum(now - first for first, now in shares.values())
        left = len(self.waiting) + sum(1 - now for _, now in shares.values())
        seconds = time.monotonic() - self.start
        estimate = f"{seconds / work * left / 60:.1f} min left" if work else "time left unknown"
        names = ", ".join(f"{name} {now:.0%}" for name, (_, now) in shares.items())
        ended = len(self.configs) - len(self.waiting) - len(shares)
        text = f"{ended} of {len(self.configs)} ended; {names or 'nothing runs'}; {estimate}"
        return text, 1 - left / len(self.configs)


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Gives a function that shows a text and a share: a bar, or a line now and then."""
    columns = BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}")
    last = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def show(text: str, share: float) -> None:
            nonlocal last
            bar.update(task, completed=share, description=text)
            if not console.is_terminal and time.monotonic() - last > LINE_SECONDS:
                print(text, flush=True)
                last = time.monotonic()

        yield show


def table(cells: Iterable[Cell], finished: Mapping[Cell, Found]) -> Table:
    """Returns mean and spread over the seeds that have finished, for each setting."""
    scores: dict[str, list[float]] = {}
    for cell in cells:
        miou = finished.get(cell, Found()).miou
        scores.setdefault(cell.setting, []).extend([] if miou is None else [100 * miou])
    table = Table(title="val mIoU % at the end, over seeds", title_justify="left")
    for name in ("setting", "seeds", "mean", "std", "against base", "each"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    base = scores.get("base")
    for setting, values in scores.items():
        mean = f"{statistics.mean(values):.2f}" if values else "-"
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        gain = "-"
        if base and values and setting != "base":
            gain = f"{statistics.mean(values) - statistics.mean(base):+.2f}"
        each = " ".join(f"{value:.2f}" for value in values)
        table.add_row(setting, str(len(values)), mean, spread, gain, each)
    return table


def of_other_code(finished: Mapping[Cell, Found]) -> list[str]:
    """Returns the cells that were run by another commit than this one.

    Their configs are the same, or they would not be taken for finished; their code may differ.
    """
    now = code_version()
    return [cell.name for cell, found in finished.items() if found.code != now]


def print_commands(configs: Configs) -> None:
    """Prints what would be run."""
    for cell, config in configs.items():
        found = cell.find(config)
        if found.finished:
            print(f"# {cell.name} has finished, {found}")
        else:
            print(cell.shell_line(resume=found.checkpoint is not None))


def main(args: Sequence[str]) -> int:
    """Runs the grid and returns the exit code.

    Raises:
        InputError: Something the user gave is wrong.
    """
    options = parse(args)
    # All of them now: a mistake in the last overlay must not show after a night.
    configs = {cell: cell.resolve() for cell in plan(options)}
    for cell, config in configs.items():
        cell.find(config)
    if options.dry_run:
        print_commands(configs)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 100)
    grid = Grid(configs, options.jobs, partial(console.print, soft_wrap=True, markup=False))
    try:
        with show_progress(console) as show:
            grid.run(show)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on: python scripts/ablate.py {shlex.join(args)}")
        return 130
    console.print(table(configs, grid.finished))
    others = of_other_code(grid.finished)
    if others:
        console.print(
            f"of another commit than the code has now: {', '.join(others)}. If the difference "
            "matters, delete their folders and start this again",
            soft_wrap=True,
            markup=False,
        )
    for name, lines in grid.failures.items():
        print(f"{name} has not finished: " + "\n  ".join(lines))
    print(f"report: python scripts/report.py {options.output} --output {options.output}/report")
    return 1 if grid.failures else 0


def end_as_on_ctrl_c() -> None:
    """Makes SIGTERM and a closed terminal what Ctrl-C is: the runs are stopped as well."""
    # SIGINT too: a process that was started in the background ignores it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    end_as_on_ctrl_c()
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"ablate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
