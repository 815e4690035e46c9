"""Keeps what runs reached in docs/results, and writes the tables of its page and of the README.

python scripts/results.py --add quickstart runs/ablation_quickstart --panel
python scripts/results.py          only rewrites the tables

The page, docs/results/README.md, has a block `NAME results` for all that is known of each NAME.
The README has `NAME summary`, the last table of a NAME, and `DATA overview`, all trainings on a
data set in one table, with the numbers of docs/results/published.yaml; a NAME with a block `NAME
overview` stands there instead. A row leads to the page's section that the block of its NAME stands
in, and has its title, if no other training is told of there.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from reporting.blocks import anchor, find_blocks, find_heading, write_block
from reporting.figures import draw_scores, picture
from reporting.overview import MEASURED_ALIKE, Place, overview_table
from reporting.page import Table, code_as_markdown, escape_markdown, slug, table_as_markdown
from reporting.resumed_runs import join_resumed
from reporting.run_folders import Result, Run, read_runs
from reporting.settings import Comparison, Setting, compare
from reporting.tables import class_table, run_table, summary_table

from isanet_pl.errors import InputError

KEPT = ("ckpt_path", "model.inference.", "trainer.limit_", "data.train_on_val", *MEASURED_ALIKE)
"""What is kept of a config, beginnings of dotted keys: how the score was measured."""


def add(name: str, paths: Sequence[Path], store: Path, panel: bool) -> None:
    """Keeps the comparisons of some runs, and pictures of their scores.

    Args:
        name: What they are kept as.
        paths: Run folders, or folders above them.
        store: Folder to keep them in.
        panel: Keep the best setting's picture of its predictions as well.

    Raises:
        InputError: No run is finished.
    """
    problems: list[str] = []
    comparisons = compare(join_resumed(read_runs(paths, problems)), problems)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not comparisons:
        raise InputError(f"no run is finished in {', '.join(map(str, paths))}")
    store.mkdir(parents=True, exist_ok=True)
    for old in [store / f"{name}.json", *store.glob(f"{name}.*.png")]:
        old.unlink(missing_ok=True)
    text = json.dumps([as_record(comparison) for comparison in comparisons], indent=1)
    (store / f"{name}.json").write_text(text + "\n", "utf-8")
    for comparison in comparisons:
        if len(comparison.settings) > 1:
            scores = picture("scores", "", partial(draw_scores, comparison))
            (store / _picture_name(name, comparison)).write_bytes(scores.png)
    best = next(iter(comparisons[-1].settings[0].runs.values())).panel()
    if panel and best:
        (store / f"{name}.panel.png").write_bytes(best.read_bytes())


def _picture_name(name: str, comparison: Comparison) -> str:
    return f"{name}.{slug(comparison.title)}.png"


def as_record(comparison: Comparison) -> dict[str, Any]:
    """Returns what JSON keeps of a comparison."""
    settings = [
        {
            "label": setting.label,
            "difference": setting.difference,
            "runs": {seed: _run_record(run) for seed, run in setting.runs.items()},
        }
        for setting in comparison.settings
    ]
    names = ("title", "command", "split", "classes")
    return {**{name: getattr(comparison, name) for name in names}, "settings": settings}


def _run_record(run: Run) -> dict[str, Any]:
    speeds = run.curves.get("images_per_s")
    return {
        "config": {key: value for key, value in run.config.items() if key.startswith(KEPT)},
        "folders": [str(folder) for folder in run.folders],
        "result": asdict(run.result) if run.result else None,
        "images_per_s": statistics.median(speeds.values()) if speeds else None,
        "val/miou": run.curves.get("val/miou"),
        "seconds": run.seconds,
        "all_seconds": run.all_seconds,
    }


def from_record(record: dict[str, Any]) -> Comparison:
    """Returns the comparison that JSON has kept."""
    settings = [
        Setting(
            setting["label"],
            setting["difference"],
            {seed: _run(run, record["command"]) for seed, run in setting["runs"].items()},
        )
        for setting in record["settings"]
    ]
    return Comparison(
        **{**record, "classes": tuple(record["classes"]), "settings": tuple(settings)}
    )


def _run(record: dict[str, Any], command: str) -> Run:
    curves = {}
    if record["val/miou"]:
        curves["val/miou"] = {int(step): value for step, value in record["val/miou"].items()}
    if record["images_per_s"]:
        curves["images_per_s"] = {0: record["images_per_s"]}
    result = Result(**record["result"])
    folders = tuple(map(Path, record["folders"]))
    times = record["seconds"], record["all_seconds"]
    return Run(folders, command, record["config"], result, curves, *times)


def block(name: str, comparisons: Sequence[Comparison]) -> str:
    """Returns Markdown: tables and pictures, then the single runs and commands, folded.

    Args:
        name: Of the stored results, whose pictures lie beside the page.
        comparisons: What was stored.
    """
    parts = []
    for comparison in comparisons:
        table = summary_table(comparison, comparison.reference())
        parts += [f"**{escape_markdown(comparison.title)}**", table_as_markdown(table)]
        if len(comparison.settings) > 1:
            file = _picture_name(name, comparison)
            parts.append(f"![{escape_markdown(comparison.title)}, all settings]({file})")
    parts.append(table_as_markdown(class_table(comparisons[-1])))
    runs = [r for c in comparisons for s in c.settings for r in s.runs.values() if r.result]
    parts += [
        "<details><summary>Each run, with seed, time, machine and command</summary>",
        table_as_markdown(run_table(comparisons)),
        code_as_markdown([run.result.command for run in runs if run.result]),
        "</details>",
    ]
    return "\n\n".join(parts)


def summary(comparisons: Sequence[Comparison]) -> str:
    """Returns the last table of some stored results as Markdown, with fewer columns."""
    comparison = comparisons[-1]
    table = summary_table(comparison, comparison.reference())
    wanted = (
        "setting",
        "n",
        f"{comparison.split} mIoU",
        "M params",
        "GMACs",
        "context GMACs",
        "time",
    )
    kept = [i for i, name in enumerate(table.head) if name in wanted]
    rows = [[row[i] for i in kept] for row in table.rows]
    return table_as_markdown(Table([table.head[i] for i in kept], rows))


def overview(
    name: str,
    stored: Mapping[str, Sequence[Comparison]],
    published: Path,
    places: Mapping[str, Place],
) -> str:
    """Returns one table of some trainings on a data set as Markdown.

    Args:
        name: Of the data set, or of the stored results that are shown alone.
        stored: Comparisons on one data set by the name that they are kept as.
        published: File with the numbers of others by data set; it may be missing.
        places: Of stored results by name.
    """
    others = yaml.safe_load(published.read_text("utf-8")) if published.is_file() else {}
    shared, table = overview_table(stored, others.get(name, ()), places)
    text = table_as_markdown(table)
    return f"All with {escape_markdown(', '.join(shared))}:\n\n{text}" if shared else text


def write_readme(path: Path, stored: Mapping[str, Sequence[Comparison]], store: Path) -> None:
    """Rewrites the summaries and overviews that a README has.

    Raises:
        InputError: It has one of something that is not stored.
    """
    texts = {f"{name} summary": summary(comparisons) for name, comparisons in stored.items()}
    overviews = find_blocks(path, "overview")
    places = _find_places(path, store / "README.md", stored)
    for name in overviews:
        if name in stored:
            about = {name: stored[name]}
        else:  # the name of a data set
            about = {
                other: [c for c in known if c.title.startswith(f"{name} ")]
                for other, known in stored.items()
                if other not in overviews
            }
        if any(about.values()):
            published = store / "published.yaml"
            texts[f"{name} overview"] = overview(name, about, published, places)
    for kind in ("summary", "overview"):
        for name in find_blocks(path, kind):
            if f"{name} {kind}" not in texts:
                raise InputError(f"{path} has a block '{name} {kind}', but {store} nothing for it")
            write_block(path, f"{name} {kind}", texts[f"{name} {kind}"])
            print(f"{path}: {name} {kind}")


def _find_places(
    readme: Path, page: Path, stored: Mapping[str, Sequence[Comparison]]
) -> dict[str, Place]:
    """Returns the sections of the page that have stored results, as the README leads to them."""
    places = {}
    target = Path(os.path.relpath(page, readme.parent)).as_posix()
    for name, comparisons in stored.items():
        if heading := find_heading(page, f"{name} results"):
            # The data set goes without saying.
            title = heading.removeprefix(f"{comparisons[0].title.split()[0]}, ")
            places[name] = Place(title, f"{target}#{anchor(heading)}")
    return places


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps results and rewrites the blocks of the page and the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--add", nargs="+", metavar=("NAME", "RUNS"),
        help="a name, then run folders or folders above them; replaces what has that name",
    )  # fmt: skip
    parser.add_argument(
        "--panel", action="store_true",
        help="keep a picture of images and predictions too: where the data's licence lets "
        "you publish its images",
    )  # fmt: skip
    parser.add_argument(
        "--store", type=Path, default=Path("docs/results"),
        help="where they are kept, with the page that shows all of them, README.md",
    )  # fmt: skip
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="file with summaries and overviews"
    )
    args = parser.parse_args(arguments)
    if args.add and len(args.add) < 2:
        parser.error(f"--add takes a name and run folders, got {args.add[0]} alone")
    try:
        if args.add:
            add(args.add[0], list(map(Path, args.add[1:])), args.store, args.panel)
        stored = {
            path.stem: [from_record(record) for record in json.loads(path.read_text("utf-8"))]
            for path in sorted(args.store.glob("*.json"))
        }
        page = args.store / "README.md"
        for name, comparisons in stored.items():
            write_block(page, f"{name} results", block(name, comparisons))
            print(f"{page}: {name} results")
        write_readme(args.readme, stored, args.store)
    except InputError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
