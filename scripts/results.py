"""Keeps the results of runs in docs/results and writes the README's tables from them.

python scripts/results.py --add camvid_r18_test=runs/camvid_isanet_r18-d8/version_1
python scripts/results.py          only rewrites the tables
"""

import argparse
import shutil
import sys
from pathlib import Path

from readme import write_block
from report_page import Cell, Table, code_as_markdown, table_as_markdown
from report_tables import number, spread
from run_folders import Result, read_result
from settings import statistic


def add(name: str, run: Path, store: Path) -> None:
    """Copies the result, and the last picture, of a run folder.

    Raises:
        SystemExit: The folder holds no result.
    """
    source = run / "results.json"
    if not source.is_file():
        sys.exit(f"{run} holds no results.json: fit, validate and test write it when they end")
    store.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, store / f"{name}.json")
    panels = sorted((run / "panels").glob("*.png"))
    if panels:
        shutil.copyfile(panels[-1], store / f"{name}.png")


def tables(results: dict[str, Result]) -> str:
    """Returns Markdown: a row for each run, then the per-class IoU of each data set."""
    rows = [
        [
            Cell(name),
            Cell(result.stage),
            number(result.step, "d"),
            *(spread(statistic([result.scores[key]])) for key in ("miou", "macc", "aacc")),
            Cell(result.machine or "-"),
        ]
        for name, result in results.items()
    ]
    head = ("run", "split", "step", "mIoU", "mAcc", "aAcc", "machine")
    parts = [table_as_markdown(Table(head, rows))]
    by_classes: dict[tuple[str, ...], dict[str, Result]] = {}
    for name, result in results.items():
        classes = tuple(key for key in result.scores if key.startswith("iou/"))
        by_classes.setdefault(classes, {})[name] = result
    for classes, runs in by_classes.items():
        rows = [
            [
                Cell(key.removeprefix("iou/")),
                *(spread(statistic([result.scores[key]])) for result in runs.values()),
            ]
            for key in classes
        ]
        parts.append(table_as_markdown(Table(["IoU", *runs], rows)))
    commands = [result.command for result in results.values()]
    return "\n\n".join([*parts, "Commands:", code_as_markdown(commands)])


def main() -> None:
    """Adds results and rewrites the README's block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", nargs="*", default=[], metavar="NAME=RUN", help="run folders")
    parser.add_argument("--store", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    for pair in args.add:
        name, _, run = pair.partition("=")
        if not run:
            parser.error(f"--add takes NAME=RUN_FOLDER, got {pair}")
        add(name, Path(run), args.store)
    results = {path.stem: read_result(path) for path in sorted(args.store.glob("*.json"))}
    write_block(args.readme, "results", tables(results))
    print(f"{args.readme}: {len(results)} results")


if __name__ == "__main__":
    main()
