"""Writes a report of runs: tables, curves and pictures, as Markdown and as one HTML file.

python scripts/report.py runs/ablation --output runs/report
python scripts/report.py runs/isa runs/dense --output runs/report --title "ISA and dense on CamVid"

Everything is read from run folders; runs that differ in nothing but their seed are one setting.
Exit codes: 0, files that could not be read are listed; 2 for a wrong command line.
"""

import argparse
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from reporting.figures import (
    MOST_CLASSES,
    SHOWN,
    draw_classes,
    draw_cost,
    draw_curves,
    draw_scores,
    picture,
    shorten,
)
from reporting.headline import headline
from reporting.page import (
    Block,
    Code,
    Gallery,
    Page,
    Picture,
    Points,
    Section,
    Text,
    as_html,
    markdown,
    slug,
)
from reporting.resumed_runs import join_resumed
from reporting.run_folders import Run, read_confusion, read_runs
from reporting.settings import Comparison, Setting, compare, statistic
from reporting.tables import class_table, run_table, spread, summary_table, unfinished_table

from isanet_pl.errors import InputError
from isanet_pl.pictures import draw_confusion

NOTE = (
    "Scores in percent: mean ± sample standard deviation (n - 1) over n runs with different seeds; "
    "a single run has no spread. Differences are in points, between means, from the reference."
)
LAST = (
    "A training counts with its last validation. The best one (best val) was chosen on the split "
    "that it is measured on, which favours it."
)


def build_page(
    title: str, paths: Sequence[Path], base: str | None, names: Mapping[str, str] | None = None
) -> Page:
    """Returns the report of the runs in some folders.

    Args:
        title: Of the page.
        paths: Run folders, or folders above them.
        base: Label of the setting that others are compared with; None: that of a grid, or each time
            the best.
        names: What to call settings, by their labels.

    Raises:
        InputError: There are no runs, or no such setting.
    """
    problems: list[str] = []
    names = names or {}
    runs = join_resumed(read_runs(paths, problems))
    comparisons = compare(runs, problems)
    labels = list(dict.fromkeys(setting.label for c in comparisons for setting in c.settings))
    for option, given in (("--base", [base] if base is not None else []), ("--names", names)):
        unknown = [label for label in given if label not in labels]
        if unknown:
            raise InputError(f"no setting is called {unknown[0]!r}; {option} takes {labels}")
    references = [c.reference(base) for c in comparisons]
    comparisons = [rename(comparison, names) for comparison in comparisons]
    sections = [
        section
        for comparison, reference in zip(comparisons, references, strict=True)
        for section in describe(comparison, reference.number, problems)
    ]
    unfinished = [run for run in runs if run.result is None]
    if unfinished:
        text = Text("Stopped, failed, or still running: they have no results.json.")
        sections.append(Section("Not finished", 2, [text, unfinished_table(unfinished)]))
    if problems:
        sections.append(Section("Left out", 2, [Points(problems)]))
    done = [run for run in runs if run.result]
    if done:
        commands = Code([run.result.command for run in done if run.result])
        sections.append(Section("Runs", 2, [run_table(comparisons)], folded=True))
        sections.append(Section("Commands", 2, [commands], folded=True))
    return Page(title, [head(runs), Text(NOTE), Text(LAST)], sections)


def rename(comparison: Comparison, names: Mapping[str, str]) -> Comparison:
    """Returns a comparison with other names for some settings."""
    settings = [replace(s, label=names.get(s.label, s.label)) for s in comparison.settings]
    return replace(comparison, settings=tuple(settings))


def head(runs: Sequence[Run]) -> Points:
    """Returns where and with what the runs were made."""
    results = [run.result for run in runs if run.result]
    facts = {
        "machine": {result.machine for result in results},
        "PyTorch": {result.torch for result in results},
        "commit": {result.git for result in results},
    }
    lines = [f"{len(results)} finished runs, {len(runs) - len(results)} not finished"]
    for name, values in facts.items():
        known = sorted(value for value in values if value)
        if known:
            lines.append(f"{name}: {', '.join(known)}")
    return Points(lines)


def describe(comparison: Comparison, number: int, problems: list[str]) -> list[Section]:
    """Returns the sections of a comparison; what its runs lack is left out, and said.

    Args:
        comparison: The settings.
        number: Of the one that others are compared with.
        problems: Gets a line for every file that could not be read.
    """
    settings, best = comparison.settings, comparison.settings[0]
    reference = next(setting for setting in settings if setting.number == number)
    prefix = slug(comparison.title)

    def draw(kind: str, alt: str, figure: Callable[[], Figure]) -> Picture:
        return picture(f"{prefix}-{kind}", alt, figure)

    scores: list[Block] = [headline(comparison, reference), summary_table(comparison, reference)]
    if len(settings) > 1:
        scores.append(draw("scores", "mIoU of each setting", lambda: draw_scores(comparison)))
    sections = [Section(comparison.title, 2, scores)]

    def add(title: str, *blocks: Block) -> None:
        sections.append(Section(title, 3, blocks))

    shown = f"The best {SHOWN} of {len(settings)} settings are told apart."
    many = [Text(shown)] if len(settings) > SHOWN else []
    if comparison.classes:
        chosen = f"Bars: the {MOST_CLASSES} classes whose IoU differs most."
        note = [Text(chosen)] if len(comparison.classes) > MOST_CLASSES else []
        bars = draw("classes", "IoU of each class", lambda: draw_classes(comparison))
        add("Classes", class_table(comparison), *many, *note, bars)
    if any(setting.curves("train/loss") for setting in settings):
        text = Text(
            "Seeds thin, their mean thick; the loss is averaged over a twentieth of its points."
        )
        curves = draw("curves", "learning curves", lambda: draw_curves(comparison))
        add("Learning curves", text, *many, curves)
    elif comparison.command == "fit":
        add("Learning curves", Text("Nothing to show: no metrics.csv holds train/loss."))
    if len(settings) > 1 and any(s.parameters or s.images_per_s for s in settings):
        cost = draw("cost", "cost against mIoU", lambda: draw_cost(comparison))
        add("Cost", *many, cost)
    add("Confusion", *confusion(best, comparison, draw, problems))
    add("Predictions", *panels(comparison, prefix, problems))
    return sections


def confusion(
    best: Setting,
    comparison: Comparison,
    draw: Callable[[str, str, Callable[[], Figure]], Picture],
    problems: list[str],
) -> list[Block]:
    """Returns the confusion matrix of the best setting, summed over its runs."""
    name = f"confusion_{comparison.split}.csv"
    total, count = torch.zeros(len(comparison.classes), len(comparison.classes)), 0
    for run in best.runs.values():
        path = run.folder / name
        try:
            names, counts = read_confusion(path)
            if tuple(names) != comparison.classes:
                raise ValueError(f"its classes are {names}")
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{path} is left out: {error}")
            continue
        total, count = total + torch.tensor(counts), count + 1
    if not count:
        return [Text(f"Nothing to show: no run of {best.label} holds {name}.")]
    classes = [shorten(text, 24) for text in comparison.classes]
    title = f"{best.label}, pixels of {count} of {len(best.runs)} runs"
    return [Text(title), draw("confusion", title, lambda: draw_confusion(total, classes))]


def panels(comparison: Comparison, prefix: str, problems: list[str]) -> list[Block]:
    """Returns the last predictions of one run of each setting, side by side."""
    pictures, missing = [], []
    for number, setting in enumerate(comparison.settings):
        found = [
            (seed, path) for seed, run in sorted(setting.runs.items()) if (path := run.panel())
        ]
        if not found:
            missing.append(setting.label)
            continue
        seed, path = found[0]
        smaller = io.BytesIO()
        try:
            with Image.open(path) as image:
                image.convert("RGB").save(smaller, "WEBP", quality=85)
            png = path.read_bytes()
        except (OSError, SyntaxError) as error:  # Pillow's word for a PNG with broken chunks
            problems.append(f"{path} is left out: {error}")
            missing.append(setting.label)
            continue
        steps = re.search(r"step=(\d+)", path.stem)
        after = f", after {int(steps[1])} steps" if steps else ""
        result = setting.runs[seed].result
        assert result is not None
        score = spread(statistic([result.scores["miou"]])).text
        alt = f"{setting.label}, seed {seed}{after}: {score} mIoU"
        pictures.append(
            Picture(f"{prefix}-panel-{number}", alt, png, smaller.getvalue(), "image/webp")
        )
    blocks: list[Block] = [Gallery(pictures)] if pictures else []
    return [*blocks, Text(f"No pictures of {', '.join(missing)}.")] if missing else blocks


def write(page: Page, folder: Path) -> None:
    """Writes report.html, report.md and the pictures of the latter, plots as SVG too.

    Raises:
        InputError: The folder cannot be written.
    """
    blocks = [block for section in page.sections for block in section.blocks]
    galleries = [block.pictures for block in blocks if isinstance(block, Gallery)]
    pictures = [block for block in blocks if isinstance(block, Picture)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shown in [*pictures, *(p for gallery in galleries for p in gallery)]:
            (folder / f"{shown.name}.png").write_bytes(shown.png)
            if shown.mime == "image/svg+xml":
                (folder / f"{shown.name}.svg").write_bytes(shown.embedded)
        (folder / "report.md").write_text(markdown(page), "utf-8")
        (folder / "report.html").write_text(as_html(page), "utf-8")
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders above them")
    add("--output", type=Path, required=True, help="folder for report.html, report.md and pictures")
    add("--title", default="Segmentation runs", help="heading of the report")
    add(
        "--base",
        help="label of the setting that others are compared with; else a grid's base, or the best",
    )
    add(
        "--names", nargs="+", default=[], metavar="LABEL=NAME",
        help="what to call settings, as base=ISA context_none='no context'",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        if not all("=" in pair for pair in args.names):
            raise InputError(f"--names takes LABEL=NAME, got {' '.join(args.names)}")
        names = dict(pair.split("=", 1) for pair in args.names)
        page = build_page(args.title, args.runs, args.base, names)
        write(page, args.output)
    except InputError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.output}: report.html, report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
