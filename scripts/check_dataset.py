"""Reads every file of a data set; says what it holds and what is wrong with it.

python scripts/check_dataset.py --data SegmentationFolder --data.root my_data
python scripts/check_dataset.py --config configs/camvid_isanet_r18-d8.yaml --data.root data/camvid

Writes fingerprint.json, contact_sheet.png and classes.png; with --suggest-config FILE also a config
that suits the data and this machine. Exit codes: 0 for nothing or only warnings, 1 for errors
(training or evaluation would fail or be wrong), 2 for a wrong command line.
"""

import argparse
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat
from rich.console import Console
from rich.progress import Progress

from isanet_pl.check.facts import read_pairs
from isanet_pl.check.fingerprint import Fingerprint, find_duplicates, summarise
from isanet_pl.check.report import class_table, print_problems, split_table, write_report
from isanet_pl.check.scan import scan
from isanet_pl.check.suggest import Device, find_machine, suggest_config
from isanet_pl.check.verdict import Problem, find_problems
from isanet_pl.data import SegmentationDataModule
from isanet_pl.data.files import Pair
from isanet_pl.errors import InputError

CHOSEN = ("batch_size", "crop_size", "scale_range", "base_size", "cat_max_ratio", "predict_dir",
          "train_on_val")  # fmt: skip
"""Arguments of the data module that a suggested config chooses itself, or has no use for."""
LINE_SECONDS = 10
"""Between two lines of progress where there is no terminal."""


def parse(args: Sequence[str] | None) -> Namespace:
    """Returns the options; those of a config file that are not about data are read over.

    Raises:
        SystemExit: The command line is wrong.
    """
    parser = ArgumentParser(description="Reads every file of a data set; says what is wrong.")
    parser.add_argument("--config", action="config", help="Config of a run; its data are checked.")
    parser.add_argument(
        "--output",
        type=str | None,
        help="Folder for the report; null: runs/dataset_check/NAME, with the name of the root.",
    )
    parser.add_argument("--workers", type=int | None, help="Processes; null: one for each core.")
    parser.add_argument("--suggest-config", type=str | None, help="Write a config to this file.")
    parser.add_argument(
        "--device", type=Device | None, help="Of that config; null: cuda where there is one."
    )
    parser.add_argument(
        "--memory", type=PositiveFloat | None, help="GB of that device; null: what it has."
    )
    parser.add_subclass_arguments(
        SegmentationDataModule, "data", required=True, fail_untyped=False, help="What to check."
    )
    for key in sorted(_keys_of_configs(args) - {"output", "workers", "data"}):
        parser.add_argument(f"--{key}", type=Any, help=SUPPRESS)
    return parser.parse_args(args)


def _keys_of_configs(args: Sequence[str] | None) -> set[str]:
    """Returns the keys of all config files on the command line: what a run is made of.

    Raises:
        InputError: One is no YAML.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    paths = [Path(name) for name in finder.parse_known_args(args)[0].config]
    keys: set[str] = set()
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no YAML file: {error}") from error
        keys |= set(map(str, content)) if isinstance(content, dict) else set()
    return keys


def build_data(options: Namespace) -> SegmentationDataModule:
    """Returns the data module alone, without network and trainer.

    Raises:
        InputError: It refuses an argument, its folder does not exist, or it has no files.
    """
    module, name = options.data.class_path.rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)
    data: SegmentationDataModule = kind(**options.data.get("init_args", {}))
    if kind.list_pairs is SegmentationDataModule.list_pairs:
        raise InputError(f"{name} makes its images itself: it has no files to check")
    _ = data.root_path  # raises where it is no folder
    return data


def list_splits(data: SegmentationDataModule) -> tuple[dict[str, list[Pair]], list[Problem]]:
    """Returns the pairs of each split that has its own, and which splits are not there."""
    pairs: dict[str, list[Pair]] = {}
    problems = []
    for split in ("train", "val", "test"):
        try:
            found = data.list_pairs(split)
        except InputError as error:
            needed = split != "test"
            message = str(error) + ("" if needed else "; only `isanet-pl test` needs this split")
            problems.append(Problem("error" if needed else "warning", split, message))
            continue
        if split == "test" and found == pairs.get("val"):
            print("test is val: not read again")
        else:
            pairs[split] = found
    return pairs, problems


@contextmanager
def show_progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Gives a function that is told of each advance: a bar, or a line now and then."""
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("reading", total=total)
    start = last = time.monotonic()
    done = 0

    def advance(split: str, count: int) -> None:
        nonlocal done, last
        bar.start()  # not before: its thread must not run while processes are forked
        bar.update(task, advance=count, description=split)
        done += count
        now = time.monotonic()
        if not console.is_terminal and now - last > LINE_SECONDS:
            left = (now - start) / done * (total - done)
            print(f"{split}: {done} of {total} pairs read, {left / 60:.1f} min left", flush=True)
            last = now

    try:
        yield advance
    finally:
        if console.is_terminal:  # elsewhere older releases of rich leave an empty line
            bar.stop()
    seconds = time.monotonic() - start
    print(f"{done} pairs read in {seconds:.1f} s, {1000 * seconds / max(1, done):.1f} ms each")


def take_fingerprint(
    data: SegmentationDataModule,
    pairs: Mapping[str, Sequence[Pair]],
    workers: int | None,
    console: Console,
) -> Fingerprint:
    """Returns the fingerprint of some splits, all of whose files are read."""
    read = partial(read_pairs, table=data.table, read_codes=data.read_codes)
    with show_progress(console, sum(map(len, pairs.values()))) as advance:
        facts = scan(pairs, read, workers, advance)
    splits = {
        name: summarise(found, data.table, data.num_classes, data.num_images.get(name))
        for name, found in facts.items()
    }
    names = tuple(data.class_names)
    return Fingerprint(type(data).__name__, str(data.root), names, splits, find_duplicates(facts))


def check(options: Namespace) -> int:
    """Checks, writes the report, and returns the exit code.

    Raises:
        InputError: The data module cannot be built, or a file cannot be written.
    """
    data = build_data(options)
    folder = Path(options.output or f"runs/dataset_check/{data.root_path.resolve().name}")
    suggested = Path(options.suggest_config) if options.suggest_config else None
    try:
        # What is wrong with these is said now, and not when an hour was spent.
        if suggested is not None:
            if suggested.exists():
                raise InputError(f"{suggested} exists; choose another --suggest-config FILE")
            machine = find_machine(options.device, options.memory)
            suggested.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(width=None if sys.stdout.isatty() else 100)
        pairs, problems = list_splits(data)
        fingerprint = take_fingerprint(data, pairs, options.workers, console)
        problems += find_problems(
            fingerprint,
            data.eval_batch_size,
            1 if suggested else data.batch_size,  # a suggestion has its own
            data.train_on_val,
        )
        problems.sort(key=lambda problem: problem.level)
        if fingerprint.splits:
            console.print(split_table(fingerprint.splits), class_table(fingerprint))
        write_report(folder, fingerprint, problems, pairs, data)
        code = print_problems(console, problems, str(data.root_path))
        print(f"written to {folder}")
        if suggested is not None and code == 0:
            name = options.data.class_path.removeprefix("isanet_pl.data.")
            text = suggest_config(
                fingerprint, machine, name, facts_of_data(options.data, type(data))
            )
            suggested.write_text(text, "utf-8")
            print(f"{suggested}: a config for {machine}; isanet-pl fit --config {suggested}")
        elif suggested is not None:
            print(f"{suggested} was not written: correct the errors first")
    except OSError as error:
        raise InputError(f"cannot access {error.filename}: {error.strerror}") from error
    return code


def facts_of_data(options: Namespace, kind: type[SegmentationDataModule]) -> dict[str, Any]:
    """Returns the arguments of the data module that say what the data are, the root absolute.

    These are all that the user set, but for those that the suggestion itself chooses.
    """
    known = {
        **inspect.signature(SegmentationDataModule).parameters,
        **inspect.signature(kind).parameters,
    }
    given = {
        name: value
        for name, value in options.init_args.items()
        if name not in CHOSEN and (name not in known or value != known[name].default)
    }
    return {**given, "root": str(Path(options.init_args.root).absolute())}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        return check(parse(args))
    except InputError as error:
        print(f"check_dataset: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
