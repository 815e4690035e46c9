"""Measures whether a long training run grows: in memory, and in open files.

    python scripts/long_run.py --steps 2000 --validations 5 --output long_run

The run is that of configs/quickstart.yaml, made small, in a process of its own with two loader
processes for each loader. Memory and open files of all of them are read several times a second.
Writes samples.csv and growth.png. A line is fitted to each over the second half of the steps: exits
with 1 if memory grows by more than --most_mib, or open files by more than --most_files. For Linux.
"""

import argparse
import contextlib
import csv
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
OWN = ("Pss_Anon:", "Pss_Shmem:")  # of Linux 5.4 and later
STEP = re.compile(r"step (\d+)/")


@dataclass(frozen=True)
class Reading:
    """What all processes of a run hold at one moment."""

    second: float
    step: int
    main_mib: float
    workers_mib: float
    num_workers: int
    main_files: int
    workers_files: int


def parse_arguments() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of the run")
    parser.add_argument("--validations", type=int, default=5, help="validations on the way")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each loader")
    parser.add_argument("--interval", type=float, default=0.25, help="seconds between two readings")
    parser.add_argument(
        "--most_mib", type=float, default=16, help="growth over the second half that is too much"
    )
    parser.add_argument(
        "--most_files",
        type=float,
        default=2,
        help="the same of open files, some of which are brief",
    )
    parser.add_argument("--output", type=Path, default=Path("long_run"), help="folder of results")
    return parser.parse_args()


def start(folder: Path, steps: int, validations: int, workers: int) -> subprocess.Popen[str]:
    """Returns the process of the run; its lines come as they are said."""
    options = {
        "config": ROOT / "configs" / "quickstart.yaml",
        "runs_dir": folder / "runs",
        "name": "long",
        "progress.every_n_steps": 5,
        "last_checkpoint.every_n_steps": max(1, steps // 20),
        "panels.num_images": 2,
        "model.network.key_channels": 8,
        "model.network.value_channels": 8,
        "model.network.out_channels": 8,
        "data.num_train": 64,
        "data.num_eval": 4,
        "data.batch_size": 2,
        "data.eval_batch_size": 2,
        "data.num_workers": workers,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // validations,
    }
    return launch(options)


def launch(options: Mapping[str, object]) -> subprocess.Popen[str]:
    """Returns the process of a fit with some options; its lines come as they are said."""
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "isanet_pl", "fit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def held(process: int) -> tuple[float, int]:
    """Returns the MiB that a process holds, without those of files, and its open files.

    Loader processes are forks of the main one: a page that several share counts in each of them by
    its part, so that the sum is what all of them take. Pages of files, such as PyTorch's libraries,
    are left out: they are shared with whatever else runs on the machine.
    """
    facts = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kib = sum(int(fact.split()[1]) for fact in facts if fact.startswith(OWN))
    return kib / 1024, len([*Path(f"/proc/{process}/fd").iterdir()])


def children(process: int) -> list[int]:
    """Returns the processes that a process has started and that still run."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def read(process: int, second: float, step: int) -> Reading | None:
    """Returns what the processes of a run hold now; None if one of them is just ending."""
    with contextlib.suppress(OSError):
        main, workers = held(process), [held(child) for child in children(process)]
        return Reading(
            second,
            step,
            main[0],
            sum(mib for mib, _ in workers),
            len(workers),
            main[1],
            sum(files for _, files in workers),
        )
    return None


def watch(process: subprocess.Popen[str], interval: float) -> list[Reading]:
    """Returns the readings of a run, taken until it ends.

    Raises:
        SystemExit: The run failed.
    """
    lines: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        lines.extend(process.stdout)

    listener = threading.Thread(target=listen)
    listener.start()
    readings, begin = [], time.monotonic()
    while process.poll() is None:
        found = next((m for line in reversed(lines) if (m := STEP.match(line))), None)
        reading = read(process.pid, time.monotonic() - begin, int(found[1]) if found else 0)
        if reading is not None:
            readings.append(reading)
        time.sleep(interval)
    listener.join()
    if process.returncode:
        sys.exit(f"the run failed:\n{''.join(lines[-20:])}")
    return readings


def second_half(readings: Sequence[Reading], steps: int) -> list[Reading]:
    """Returns the readings of the second half of the steps, with all loader processes at work."""
    most = max(reading.num_workers for reading in readings)
    return [r for r in readings if steps / 2 <= r.step < steps and r.num_workers == most]


def growth(readings: Sequence[Reading], name: str) -> float:
    """Returns by how much a value grows over the readings, by the line that fits them best."""
    steps = np.array([reading.step for reading in readings], dtype=float)
    values = np.array([getattr(reading, name) for reading in readings], dtype=float)
    slope = np.polyfit(steps, values, 1)[0]
    return float(slope * (steps[-1] - steps[0]))


def write(readings: Sequence[Reading], folder: Path) -> None:
    """Writes the readings as a table and as a picture."""
    names = [field.name for field in fields(Reading)]
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows([getattr(reading, name) for name in names] for reading in readings)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    steps = [reading.step for reading in readings]
    for axis, unit, label in zip(axes, ("mib", "files"), ("MiB", "open files"), strict=True):
        for name, colour in (("main", "#1f4e79"), ("workers", "#d07a1c")):
            values = [getattr(reading, f"{name}_{unit}") for reading in readings]
            axis.plot(steps, values, ".", markersize=2, color=colour, label=name)
        axis.set_ylim(0)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(markerscale=4)
    axes[1].set_xlabel("optimiser step")
    figure.savefig(folder / "growth.png", dpi=120)


def main() -> None:
    """Runs, measures, reports, and exits with 1 if something grows."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    process = start(arguments.output, arguments.steps, arguments.validations, arguments.workers)
    readings = watch(process, arguments.interval)
    write(readings, arguments.output)
    half = second_half(readings, arguments.steps)
    if len(half) < 10:
        sys.exit(f"only {len(half)} readings of the second half: a longer run, or more often")
    grown = []
    for name in ("main_mib", "workers_mib", "main_files", "workers_files"):
        by, last = growth(half, name), getattr(half[-1], name)
        print(f"{name:14} {getattr(half[0], name):7.1f} to {last:7.1f}, grows by {by:+.2f}")
        if by > (arguments.most_mib if name.endswith("mib") else arguments.most_files):
            grown.append(name)
    print(f"{len(half)} readings of the last {arguments.steps // 2} steps of {arguments.steps}")
    if grown:
        sys.exit(f"grows: {', '.join(grown)}")


if __name__ == "__main__":
    main()
