"""Stops a training run again and again, resumes it, and compares its end with a run left alone.

    python scripts/stress_resume.py --stops 20

The run is that of configs/quickstart.yaml, made short, with dropout and an average of the weights,
on the CPU in fp32. It is stopped at random moments by SIGKILL, by SIGKILL while a checkpoint is
being written, and by SIGTERM, in turns, and goes on with 0, 1 and 4 loader processes, in turns.
Exits with 1 if anything differs: weights, average, optimiser, schedule, place in the data, random
numbers, or a line of metrics.csv.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from long_run import STEP, launch

ROOT = Path(__file__).parent.parent
KINDS = ("SIGKILL", "SIGKILL while saving", "SIGTERM")
WORKERS = (0, 1, 4)
COMPARED = (
    "global_step",
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "Synthetic",
    "callbacks.LastCheckpoint",
)
UNTIMED = ("train/loss", "val/loss", "val/miou")


def parse_arguments() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=20, help="how often the run is stopped")
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the two runs stay; none: nowhere")
    return parser.parse_args()


def start(folder: Path, name: str, steps: int, workers: int) -> subprocess.Popen[str]:
    """Returns a process that starts a run, or goes on with it; its lines come as they are said."""
    options = {
        "config": ROOT / "configs" / "quickstart.yaml",
        "runs_dir": folder,
        "name": name,
        "resume": "true",
        "ema_decay": 0.9,
        "last_checkpoint.every_n_steps": 3,
        "progress.every_n_steps": 1,
        "panels.num_images": 0,
        "model.network.dropout": 0.2,
        "data.num_train": 50,
        "data.num_eval": 4,
        "data.batch_size": 2,
        "data.eval_batch_size": 2,
        "data.num_workers": workers,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 10,
        "trainer.log_every_n_steps": 1,
        "trainer.precision": "32-true",
    }
    return launch(options)


def steps_of(process: subprocess.Popen[str], lines: list[str]) -> Iterator[int]:
    """Yields the step whenever the run reports one; keeps all it says in `lines`."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if found := STEP.match(line):
            yield int(found[1])


def stop(process: subprocess.Popen[str], kind: str, part: Path) -> None:
    """Stops a process within the next tenth of a second, or when a checkpoint is half written."""
    if kind == "SIGKILL while saving":
        while not part.exists() and process.poll() is None:
            pass
    else:
        time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)


def run_until_stopped(folder: Path, steps: int, number: int) -> bool:
    """Starts or resumes the run and stops it; returns False if it ended before."""
    # Every kind with every number of workers.
    kind = KINDS[number % len(KINDS)]
    workers = WORKERS[(number + number // len(KINDS)) % len(WORKERS)]
    part = folder / "stopped" / "version_0" / "checkpoints" / "last.ckpt.part"
    process = start(folder, "stopped", steps, workers)
    lines: list[str] = []
    # The first start is stopped after its first checkpoint, that of step 3: before it, there is no
    # run to go on with.
    patience = random.randint(1 if number else 4, 8)
    first = last = seen = 0
    for step in steps_of(process, lines):
        first, last, seen = first or step, step, seen + 1
        if seen == patience:
            stop(process, kind, part)
    code = process.wait()
    if code == 0:
        return False
    left = ", half a checkpoint left" if part.exists() else ""
    print(
        f"{number + 1:3}  {workers} workers  from step {first}, {kind} after {last}{left}",
        flush=True,
    )
    expected = 128 + signal.SIGTERM if kind == "SIGTERM" else -signal.SIGKILL
    if code != expected:
        sys.exit(f"exit code {code} instead of {expected}:\n{''.join(lines)}")
    return True


def run_to_end(folder: Path, name: str, steps: int) -> None:
    """Starts or resumes a run and waits for its end."""
    process = start(folder, name, steps, 0)
    lines: list[str] = []
    for _ in steps_of(process, lines):
        pass
    if process.wait():
        sys.exit(f"{name} failed:\n{''.join(lines)}")


def differences(one: Any, other: Any, name: str) -> Iterator[str]:
    """Yields the names of what differs between two parts of checkpoints, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys(), key=str):
            yield from differences(one.get(key), other.get(key), f"{name}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield name
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield name
    elif one != other:
        yield name


def compare(one: Path, other: Path) -> list[str]:
    """Returns what differs between two runs: their last and best checkpoints, their metrics."""
    found: list[str] = []
    for file in ("last.ckpt", "best.ckpt"):
        pair = [
            torch.load(run / "checkpoints" / file, map_location="cpu", weights_only=True)
            for run in (one, other)
        ]
        for name in COMPARED:
            parts = pair
            for key in name.split("."):
                parts = [part[key] for part in parts]
            found += differences(parts[0], parts[1], f"{file}: {name}")
    if metrics(one) != metrics(other):
        found.append("metrics.csv")
    return found


def metrics(run: Path) -> list[tuple[str, ...]]:
    """Returns the lines of a run's metrics.csv that do not depend on the clock."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    return sorted(tuple(row.get(key, "") for key in ("step", *UNTIMED)) for row in rows)


def main() -> None:
    """Runs both, compares them, and exits with 1 if they differ."""
    arguments = parse_arguments()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if any((folder / name).exists() for name in ("alone", "stopped")):
            sys.exit(f"{folder} holds runs of before: remove them, or give another --folder")
        run_to_end(folder, "alone", arguments.steps)
        for number in range(arguments.stops):
            if not run_until_stopped(folder, arguments.steps, number):
                sys.exit(f"the run ended after {number} stops: give it more --steps")
        run_to_end(folder, "stopped", arguments.steps)
        runs = [folder / name / "version_0" for name in ("alone", "stopped")]
        found = compare(*runs)
        lines = len(metrics(runs[0]))
    if found:
        sys.exit("the runs differ:\n  " + "\n  ".join(found))
    print(f"{arguments.stops} stops, {lines} lines of metrics.csv: no difference, bit for bit")


if __name__ == "__main__":
    main()
