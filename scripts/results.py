"""Keeps the results of runs in docs/results and writes the README's tables from them.

python scripts/results.py --add camvid_r18_test=runs/camvid_isanet_r18-d8/version_1
python scripts/results.py          only rewrites the tables
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from readme import write_block


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


def percent(value: float | None) -> str:
    """Returns a fraction in percent, or a dash for an absent class."""
    return "-" if value is None else f"{100 * value:.2f}"


def tables(results: dict[str, Any]) -> str:
    """Returns Markdown: a row for each run, then the per-class IoU of each data set."""
    lines = ["| run | split | step | mIoU | mAcc | aAcc | machine |", "|" + "---|" * 7]
    for name, result in results.items():
        scores = result["scores"]
        cells = [percent(scores[key]) for key in ("miou", "macc", "aacc")]
        lines.append(
            f"| {name} | {result['stage']} | {result['step']} | {' | '.join(cells)} "
            f"| {result['machine']} |"
        )
    by_classes: dict[tuple[str, ...], dict[str, dict[str, float | None]]] = {}
    for name, result in results.items():
        iou = {k.removeprefix("iou/"): v for k, v in result["scores"].items() if "iou/" in k}
        by_classes.setdefault(tuple(iou), {})[name] = iou
    for classes, runs in by_classes.items():
        lines += ["", f"| IoU | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
        for label in classes:
            lines.append(f"| {label} | {' | '.join(percent(r[label]) for r in runs.values())} |")
    lines += ["", "Commands:", "", "```", *(r["command"] for r in results.values()), "```"]
    return "\n".join(lines)


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
    results = {p.stem: json.loads(p.read_text()) for p in sorted(args.store.glob("*.json"))}
    write_block(args.readme, "results", tables(results))
    print(f"{args.readme}: {len(results)} results")


if __name__ == "__main__":
    main()
