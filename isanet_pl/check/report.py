"""What a data check leaves behind: tables and verdict on the terminal, JSON and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isanet_pl.check.contact_sheet import COLUMNS, draw_classes, draw_contact_sheet, read_thumbnail
from isanet_pl.check.fingerprint import Fingerprint, SplitFingerprint
from isanet_pl.check.verdict import Problem
from isanet_pl.data import SegmentationDataModule
from isanet_pl.data.files import Pair


def split_table(splits: Mapping[str, SplitFingerprint]) -> Table:
    """Returns the sizes and colours of each split."""
    table = Table(title="splits", title_justify="left")
    heads = ("", "pairs", "smallest", "median", "largest", "sizes", "ignored", "mean RGB", "std")
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for name, split in splits.items():
        sizes = ["-"] * 3
        if split.sizes:
            sizes = ["{1}x{0}".format(*split.size_at(quantile)) for quantile in (0, 0.5, 1)]
        moments = [" ".join(f"{x:.0f}" for x in m) if m else "-" for m in (split.mean, split.std)]
        ignored = f"{100 * split.ignored_share:.1f} %"
        table.add_row(name, str(split.num_pairs), *sizes, str(len(split.sizes)), ignored, *moments)
    return table


def class_table(fingerprint: Fingerprint) -> Table:
    """Returns each class's share of the labelled pixels, and of the images, in every split."""
    table = Table(title="classes: % of the labelled pixels, % of the images", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("class")
    for name in fingerprint.splits:
        table.add_column(f"{name} px", justify="right")
        table.add_column("images", justify="right")
    for index, label in enumerate(fingerprint.class_names):
        cells = []
        for split in fingerprint.splits.values():
            images = 100 * split.class_images[index] / max(1, split.num_pairs)
            here = split.class_pixels[index] > 0
            cells += [f"{100 * split.shares[index]:.3g}", f"{images:.3g}"] if here else ["-", "-"]
        table.add_row(str(index), escape(label), *cells)
    return table


def write_report(
    folder: Path,
    fingerprint: Fingerprint,
    problems: Sequence[Problem],
    pairs: Mapping[str, Sequence[Pair]],
    data: SegmentationDataModule,
) -> None:
    """Writes fingerprint.json, the contact sheet, and the picture of the classes of train."""
    text = fingerprint.to_json(problems=[asdict(problem) for problem in problems])
    (folder / "fingerprint.json").write_text(text, "utf-8")
    read = partial(read_thumbnail, table=data.table, read_codes=data.read_codes)
    shown = {}
    for split, files in pairs.items():
        count = min(COLUMNS, len(files))
        chosen = [files[(2 * i + 1) * len(files) // (2 * count)] for i in range(count)]
        shown[split] = [t for pair in chosen if (t := read(pair, edge=480)) is not None]
    if any(shown.values()):
        figure = draw_contact_sheet(shown, data.class_names, data.palette)
        figure.savefig(folder / "contact_sheet.png")
    if "train" not in fingerprint.splits:
        return
    train = fingerprint.splits["train"]
    largest = {i: (Path(pair[0]), Path(pair[1])) for i, pair in enumerate(train.largest) if pair}
    tiles = {i: t for i, pair in largest.items() if (t := read(pair, edge=240)) is not None}
    if tiles:
        draw_classes(tiles, data.class_names, train.shares).savefig(folder / "classes.png")


def print_problems(console: Console, problems: Sequence[Problem], root: str) -> int:
    """Prints what is wrong, with paths below the root, and the verdict; returns the exit code."""
    colours = {"error": "red", "warning": "yellow"}
    for problem in problems:
        text = f"{problem.split}: {problem.message}".removeprefix(": ").replace(f"{root}/", "")
        text = text.encode("utf-8", "replace").decode()  # a file's name may be no UTF-8
        head = f"[bold {colours[problem.level]}]{problem.level}[/]"
        console.print(f"{head} {escape(text)}", highlight=False, soft_wrap=True)
    counts = {level: sum(problem.level == level for problem in problems) for level in colours}
    failed = counts["error"] > 0
    verdict = "not fit for training" if failed else "fit for training"
    numbers = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts.items())
    console.print(f"[bold]{verdict}[/]: {numbers}", highlight=False)
    return int(failed)
