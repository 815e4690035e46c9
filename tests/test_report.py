"""The report: grouping, numbers, joining, escaping; what is missing or broken."""

import json
import os
import re
from html.parser import HTMLParser
from urllib.parse import urlparse

import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.usefixtures("scripts_on_path")

CLASSES = {"road": 0.9, "car": 0.3}
VOID = {"area", "br", "hr", "img", "input", "link", "meta"}


def write_run(
    folder, miou=None, seed=0, steps=(10, 20), command="fit", config=None, options="", **scores
):
    """Writes a run folder as isanet-pl does; without a score it is one that was killed.

    `config` holds dotted keys, `options` is the rest of the command line; `scores` replaces those
    of the classes.
    """
    folder.mkdir(parents=True)
    (folder / "panels").mkdir()
    stage = "test" if command == "test" else "val"
    content = {"seed_everything": seed, "name": folder.parent.name, "trainer": {"max_steps": 20}}
    content["model"] = {"network": {"context": "isa"}, "optimizer": {"class_path": "torch.SGD"}}
    content["model"]["inference"] = {"mode": "whole", "scales": [1.0], "flip": False}
    content["data"] = {"class_path": "isanet_pl.data.CamVid", "init_args": {"root": "a/camvid"}}
    if command != "fit":
        content["verbose"] = True
    for key, value in (config or {}).items():
        *path, last = key.split(".")
        part = content
        for name in path:
            part = part.setdefault(name, {})
        part[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    if command == "fit":
        lines = ["epoch,step,train/loss,images_per_s,lr/new,val/miou"]
        for step in steps:
            lines.append(f"0,{step - 1},{1 / step},{step},0.1,")
            lines.append(f",{step},,,,{step / 100}")
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if miou is None:
        return folder
    Image.new("RGB", (8, 4), "red").save(folder / "panels" / f"{stage}_step=000020.png")
    line = f"isanet-pl {command} {options}".strip()
    record = {"command": line, "stage": stage, "step": 20, "seconds": 90}
    record |= {"machine": "a machine", "torch": "2.8", "git": "abc", "parameters": 2_500_000}
    record |= {"gmacs": 4.25, "context_gmacs": 0.5, "image_size": [4, 8]}
    classes = {f"iou/{name}": value for name, value in (scores or CLASSES).items()}
    record["scores"] = {"miou": miou, "macc": 0.5, "aacc": 0.75, **classes}
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_a_walk_ends_in_spite_of_circular_links(tmp_path):
    from reporting.run_folders import find_folders

    run = write_run(tmp_path / "runs" / "isa" / "version_0", 0.5)
    for name in ("here", "there"):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "runs")
    assert find_folders([tmp_path / "runs"]) == [run]


def test_a_grid_that_went_on_with_newer_code_is_one(tmp_path):
    from reporting.run_folders import read_runs
    from reporting.settings import compare

    for setting in ("base", "context_none"):
        for seed in range(3):
            config = {"model.poly_power": 0.9} if seed else {}  # an option newer than seed 0
            folder = tmp_path / setting / f"seed{seed}" / "version_0"
            write_run(folder, 0.5, seed, config=config | context(setting))
    problems = []
    [comparison] = compare(read_runs([tmp_path], problems), problems)
    assert {s.label: len(s.runs) for s in comparison.settings} == {"base": 3, "context_none": 3}
    assert problems == []


@pytest.mark.parametrize("key", ["data.init_args.root", "model.network.weights_path"])
def test_seeds_with_files_of_one_name_in_other_places_are_told(tmp_path, key):
    from reporting.run_folders import read_runs
    from reporting.settings import compare

    for seed, place in enumerate(("clean", "relabelled")):
        write_run(tmp_path / place / "version_0", 0.5, seed, config={key: f"{place}/camvid"})
    config = {key: "other/machine/camvid"}
    write_run(tmp_path / "there" / "clean" / "version_0", 0.5, 2, config=config)
    problems = []
    [comparison] = compare(read_runs([tmp_path], problems), problems)
    assert [len(setting.runs) for setting in comparison.settings] == [3]
    [problem] = problems  # a run of the same name may lie elsewhere
    assert "is relabelled/camvid and not clean/camvid" in problem


def context(value):
    return {"model.network.context": value}


@pytest.fixture
def grid(tmp_path):
    """Three seeds of isa, one of none, one of dense that was killed."""
    for seed, miou in enumerate((0.5, 0.6, 0.7)):
        write_run(tmp_path / "runs" / "isa" / f"version_{seed}", miou, seed)
    write_run(tmp_path / "runs" / "none" / "version_0", 0.25, config=context("none"))
    write_run(tmp_path / "runs" / "dense" / "version_0", config=context("dense"))
    return tmp_path / "runs"


def compared(*paths):
    """Returns the comparisons of some folders, and what was left out."""
    from reporting.resumed_runs import join_resumed
    from reporting.run_folders import read_runs
    from reporting.settings import compare

    problems = []
    return compare(join_resumed(read_runs(paths, problems)), problems), problems


def report(*arguments):
    from report import main

    return main([str(argument) for argument in arguments])


def rows(text, first):
    """Returns the cells of the Markdown rows that start with a cell."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
    return [[cell.strip() for cell in row] for row in cells if row and row[0].strip() == first]


class Reader(HTMLParser):
    """Checks that tags are nested, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_statistics_are_those_of_a_sample():
    from reporting.settings import Statistic, statistic

    found = statistic([0.5, None, 0.6, 0.7])
    assert (found.mean, found.std, found.n) == (pytest.approx(0.6), pytest.approx(0.1), 3)
    assert statistic([0.5]) == Statistic(0.5, None, 1)  # one value has no spread
    assert statistic([None]) is None


def test_the_tables_hold_the_numbers_of_the_runs(grid, tmp_path):
    assert report(grid, "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    head, best = rows(text, "setting")[0], rows(text, "context=isa")[0]
    assert dict(zip(head, best, strict=True)) == {
        "setting": "context=isa",
        "n": "3",
        "val mIoU": "**60.00 ± 10.00**",
        "difference": "reference",
        "best val mIoU": "20.00 ± 0.00",
        "mAcc": "50.00 ± 0.00",
        "aAcc": "75.00 ± 0.00",
        "M params": "2.50",
        "GMACs": "4.25",
        "context GMACs": "0.50",
        "time": "2 min",
        "images/s": "15.0",
    }
    other = dict(zip(head, rows(text, "context=none")[0], strict=True))
    assert other["val mIoU"] == "25.00"  # a single run has no spread
    assert other["difference"] == "-35.00"
    assert rows(text, "car") == [["car", "30.00 ± 0.00", "30.00"]]
    killed = str(grid / "dense" / "version_0")
    assert rows(text, killed) == [[killed, "fit", "20 of 20", "20.00"]]
    assert "4 finished runs, 1 not finished" in text
    assert text.count("isanet-pl fit") == 4


def test_a_base_is_compared_with(grid, tmp_path, capsys):
    assert report(grid, "--output", tmp_path / "out", "--base", "context=none") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "+35.00" in rows(text, "context=isa")[0]
    assert report(grid, "--output", tmp_path / "out", "--base", "nothing") == 2
    assert "no setting is called 'nothing'" in capsys.readouterr().err


def test_a_grid_is_compared_with_its_base_and_named(tmp_path, capsys):
    for cell, mious in (("base", (0.5, 0.52)), ("context_none", (0.53, 0.57))):
        for seed, miou in enumerate(mious):
            folder = tmp_path / "grid" / cell / f"seed{seed}" / "version_0"
            config = {} if cell == "base" else context("none")
            write_run(folder, miou, seed, config=config)
    names = ("--names", "base=ISA", "context_none=no context")
    assert report(tmp_path / "grid", "--output", tmp_path / "out", *names) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert rows(text, "ISA")[0][3] == "reference"
    assert rows(text, "no context")[0][3] == "+4.00"
    assert "context_none" not in text.split("## Runs")[0].replace("=context_none", "")
    assert [line for line in text.splitlines() if line.startswith("- **")] == [
        "- **55.00 ± 2.83** val mIoU of no context, the best of 2 settings",
        "- **4.00 points** ahead of ISA, 1.3 times their spread over seeds",
        "- **4 runs** in 6 min altogether",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>val mIoU of no context, the best of 2 settings</dt><dd>55.00 ± 2.83</dd>" in page
    assert page.count("<details>") == page.count("</details>") == 2
    for wrong in (("nothing=x",), ("base",)):
        assert report(tmp_path / "grid", "--output", tmp_path / "out", "--names", *wrong) == 2
        assert wrong[0].split("=")[0] in capsys.readouterr().err


def test_the_headline_says_what_it_can(tmp_path):
    from reporting.headline import headline

    cheap = write_run(tmp_path / "none" / "version_0", 0.595, config=context("none"))
    write_run(tmp_path / "isa" / "version_0", 0.6)
    record = json.loads((cheap / "results.json").read_text())
    (cheap / "results.json").write_text(json.dumps(record | {"gmacs": 3.0, "seconds": None}))
    [comparison], _ = compared(tmp_path)
    facts = dict(headline(comparison, comparison.reference()).items)
    assert facts["0.50 points"].endswith("of one seed: by chance, for all that is known")
    assert facts["3.00 GMACs"] == "an image: context=none, the least within a point"
    assert facts["2 runs"] == "in ≥ 2 min altogether"


def test_only_seeds_names_and_places_are_no_difference(tmp_path):
    write_run(tmp_path / "a" / "version_0", 0.5, 0)
    same = {"data.init_args.root": "/else/where/camvid", "runs_dir": "x", "new_option": None}
    write_run(tmp_path / "b" / "version_0", 0.6, 1, config=same)
    write_run(tmp_path / "c" / "version_0", 0.1, 0, config={"model.optimizer.init_args.lr": 0.5})
    (comparison,), problems = compared(tmp_path)
    found = {setting.label: sorted(setting.runs) for setting in comparison.settings}
    assert found == {"base": ["0", "1"], "optimizer.lr=0.5": ["0"]}
    [problem] = problems
    assert "data.root is /else/where/camvid and not a/camvid" in problem


def test_a_seed_that_is_run_again_counts_once(tmp_path):
    for version, miou in ((9, 0.5), (10, 0.6)):
        write_run(tmp_path / "a" / f"version_{version}", miou, seed=4)
    (comparison,), problems = compared(tmp_path)
    (setting,) = comparison.settings
    assert (setting.miou.mean, setting.miou.n) == (0.6, 1)
    assert len(problems) == 1
    assert "version_9 is left out" in problems[0]


def test_what_may_not_be_compared_is_apart(tmp_path):
    write_run(tmp_path / "a" / "version_0", 0.5)
    write_run(tmp_path / "b" / "version_0", 0.5, sky=0.5)
    write_run(tmp_path / "c" / "version_0", 0.5, command="test", config={"ckpt_path": "x/y/c/b"})
    comparisons, _ = compared(tmp_path)
    assert [(c.command, c.classes) for c in comparisons] == [
        ("fit", ("road", "car")),
        ("fit", ("sky",)),
        ("test", ("road", "car")),
    ]


FOLDER = {"data.class_path": "isanet_pl.data.SegmentationFolder"}


@pytest.mark.parametrize(
    ("root", "other", "more", "told_apart"),
    [
        ("a/leaves", "b/cells", {"sky": 0.5}, ("cells", "leaves")),
        ("a/leaves", "b/cells", {}, ("cells", "leaves")),
        ("a/photos", "b/photos", {"sky": 0.5}, ("2 classes", "1 classes")),
        ("a/my data", "b/my-data", {"sky": 0.5}, ("2 classes", "1 classes")),  # of one file name
        ("photos", "photos", {"sky": 0.5, "sea": 0.5}, ("1", "2")),
    ],
)
def test_titles_tell_data_of_one_class_apart(root, other, more, told_apart, tmp_path):
    write_two_data_sets(tmp_path, root, other, more)
    titles = {c.title for c in compared(tmp_path / "runs")[0]}
    assert titles == {f"SegmentationFolder ({w}) val at the end of training" for w in told_apart}


def test_pictures_of_data_told_apart_are_files_of_their_own(tmp_path):
    write_two_data_sets(tmp_path, "a/my data", "b/my-data", {"sky": 0.5})
    assert report(tmp_path / "runs", "--output", tmp_path / "out") == 0
    # Of each: scores, classes, curves, cost and two panels.
    assert len(list((tmp_path / "out").glob("*.png"))) == 12


def write_two_data_sets(tmp_path, root, other, more):
    for name, place, scores in (("a", root, {}), ("b", other, more)):
        for kind in ("isa", "none"):
            config = {**FOLDER, **context(kind), "data.init_args.root": place}
            write_run(
                tmp_path / "runs" / f"{name}_{kind}" / "version_0", 0.5, config=config, **scores
            )


def test_other_evaluations_leave_a_title_as_it_is(tmp_path):
    write_run(tmp_path / "a" / "version_0", 0.5)
    write_run(tmp_path / "b" / "version_0", 0.5, command="test", sky=0.5)
    titles = [comparison.title for comparison in compared(tmp_path)[0]]
    assert titles == ["CamVid val at the end of training", "CamVid test by isanet-pl test"]


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        ([{"a": 1}, {"a": 2}], ["a=1", "a=2"]),
        (  # what most have goes without saying
            [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 2}],
            ["base", "a=2", "b=2"],
        ),
        ([{"x": None}, {"model.network.y": [8, 8], "x": 1}], ["x=null", "x=1, y=[8, 8]"]),
        (  # two of one name
            [{"x": None}, {"model.network.x": [8, 8], "x": 1}],
            ["x=null", "x=1, model.network.x=[8, 8]"],
        ),
        ([{}, {"model.network.x": [8, 8]}], ["base", "x=[8, 8]"]),  # an older version
        (
            [{"a": 1}, {"a": 1, "new": 1}, {"a": 2, "new": 1}],
            ["base (name 0)", "base (name 1)", "a=2"],
        ),
        (  # where the weights lie says less than what they are
            [{"a": 1, "checkpoint": "x/a.ckpt"}, {"a": 2, "checkpoint": "y/a.ckpt"}],
            ["a=1", "a=2"],
        ),
        (
            [{"a": 1, "checkpoint": "best.ckpt"}, {"a": 2, "checkpoint": "last.ckpt"}],
            ["a=1, checkpoint=best.ckpt", "a=2, checkpoint=last.ckpt"],
        ),
        (
            [{"checkpoint": "x/a.ckpt"}, {"checkpoint": "y/a.ckpt"}],
            ["checkpoint=x/a.ckpt", "checkpoint=y/a.ckpt"],
        ),
        (  # the class says enough
            [{"o": "torch.optim.SGD", "o.momentum": 0.9}, {"o": "torch.optim.AdamW"}],
            ["o=SGD", "o=AdamW"],
        ),
        (  # too much to say
            [dict.fromkeys("abcd", 1), dict.fromkeys("abcd", 2)],
            ["name 0", "name 1"],
        ),
    ],
)
def test_labels_say_what_differs(configs, labels):
    from reporting.labels import Kind, find_labels

    kinds = [Kind(config, "", f"name {index}") for index, config in enumerate(configs)]
    assert find_labels(kinds) == labels


def test_cells_of_a_grid_keep_their_names(tmp_path):
    for cell in ("base", "context_none"):
        for seed in (0, 1):
            config = context("none") if cell != "base" else None
            write_run(tmp_path / cell / f"seed{seed}" / "version_0", 0.5, seed, config=config)
    (comparison,), _ = compared(tmp_path)
    assert {setting.label: setting.miou.n for setting in comparison.settings} == {
        "base": 2,
        "context_none": 2,
    }
    assert {s.difference for s in comparison.settings} == {
        "context=isa",
        "context=none",
    }


def test_a_run_beside_a_grid_says_its_name(tmp_path):
    for cell in ("plain", "grid/context_none/seed0"):
        config = context("none") if cell != "plain" else None
        write_run(tmp_path / cell / "version_0", 0.5, config=config)
        for scale in (1, 2):
            path = tmp_path / cell / "version_0" / "checkpoints" / "best.ckpt"
            own = {**(config or {}), "ckpt_path": str(path), "model.inference.scales": [scale]}
            folder = tmp_path / f"{cell}_{scale}".replace("/", "_") / "version_0"
            write_run(folder, 0.5, command="test", config=own)
    comparisons, _ = compared(tmp_path)
    assert [{setting.label for setting in c.settings} for c in comparisons] == [
        {"plain", "context_none"},
        {
            f"{name} inference.scales=[{scale}]"
            for name in ("plain", "context_none")
            for scale in (1, 2)
        },
    ]


def test_a_resumed_run_is_one_run(tmp_path):
    first = write_run(tmp_path / "a" / "version_0", steps=(10, 20, 30))
    config = {"ckpt_path": "elsewhere/a/version_0/checkpoints/last.ckpt"}  # since moved
    second = write_run(tmp_path / "a" / "version_1", 0.5, steps=(25, 35), config=config)
    (comparison,), problems = compared(tmp_path)
    (run,) = comparison.settings[0].runs.values()
    assert run.folders == (first, second)
    # What came after the checkpoint was done again.
    assert run.curves["val/miou"] == {10: 0.1, 20: 0.2, 25: 0.25, 35: 0.35}
    assert list(run.curves["train/loss"]) == [10, 20, 25, 35]
    assert (run.seconds, run.all_seconds) == (90, False)
    assert problems == []


def test_the_time_of_a_run_whose_beginning_is_not_given_is_no_whole(tmp_path):
    first = write_run(tmp_path / "runs" / "a" / "version_0", 0.5)
    going_on = {"ckpt_path": f"{first}/checkpoints/last.ckpt"}
    then = write_run(tmp_path / "runs" / "a" / "version_1", 0.6, config=going_on)
    times = []
    for given in (tmp_path / "runs", then):
        comparisons, _ = compared(given)
        (run,) = comparisons[0].settings[0].runs.values()
        times.append((run.seconds, run.all_seconds))
    assert times == [(180, True), (90, False)]


def test_a_checkpoint_beside_the_root_of_the_file_system_has_no_run(tmp_path):
    from reporting.resumed_runs import owner
    from reporting.run_folders import read_runs

    write_run(tmp_path / "a" / "version_0", 0.5)
    runs = read_runs([tmp_path], [])
    for checkpoint in ("/best.ckpt", "/data/best.ckpt", "/data/run/best.ckpt"):
        assert owner(checkpoint, runs) is None


def test_a_finished_run_that_went_on_stays_a_run(tmp_path):
    write_run(tmp_path / "a" / "version_0", 0.4, steps=(10,))
    config = {"ckpt_path": "a/version_0/checkpoints/last.ckpt", "trainer.max_steps": 40}
    write_run(tmp_path / "a" / "version_1", 0.5, steps=(20,), config=config)
    (comparison,), _ = compared(tmp_path)
    found = {setting.label: list(setting.runs.values()) for setting in comparison.settings}
    assert {label: len(runs[0].folders) for label, runs in found.items()} == {
        "max_steps=20": 1,
        "max_steps=40": 2,
    }
    assert found["max_steps=40"][0].seconds == 180


def test_a_run_that_went_on_leaves_the_one_before_its_evaluations(tmp_path):
    for seed in (0, 1):
        first = write_run(tmp_path / f"s{seed}" / "version_0", 0.4, seed, steps=(10,))
        last = {"ckpt_path": str(first / "checkpoints" / "last.ckpt")}
        more = last | {"trainer.max_steps": 40}
        write_run(tmp_path / f"s{seed}" / "version_1", 0.5, seed, steps=(20,), config=more)
        write_run(tmp_path / f"test{seed}" / "version_0", 0.3, command="test", config=last)
    comparisons, problems = compared(tmp_path)
    (setting,) = next(c for c in comparisons if c.command == "test").settings
    assert sorted(setting.runs) == ["0", "1"]
    assert problems == []


def test_a_checkpoint_of_a_training_that_is_not_given_is_no_other_ones(tmp_path):
    from reporting.resumed_runs import owner
    from reporting.run_folders import read_runs

    for grid in ("r18", "r50"):
        write_run(tmp_path / grid / "base" / "seed0" / "version_0", 0.5)
    run = tmp_path / "r18" / "base" / "seed0" / "version_0"
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    assert owner(checkpoint, read_runs([tmp_path / "r50"], [])) is None
    assert owner(checkpoint, read_runs([tmp_path], [])).folder == run
    run.rename(tmp_path / "gone")  # now it may be the one that is given
    assert owner(checkpoint, read_runs([tmp_path / "r50"], [])) is not None


def test_a_part_of_a_split_is_another_evaluation(tmp_path):
    write_run(tmp_path / "a" / "version_0", 0.5)
    for name, limit in (("whole", None), ("part", 5)):
        config = {"ckpt_path": "a/version_0/checkpoints/best.ckpt"}
        config["trainer.limit_test_batches"] = limit
        write_run(tmp_path / name / "version_0", 0.4, command="test", config=config)
    comparisons, problems = compared(tmp_path)
    assert len(next(c for c in comparisons if c.command == "test").settings) == 2
    assert problems == []


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("start", ["finished", "killed", "not given"])
def test_a_training_that_starts_from_another_one_is_another_setting(tmp_path, start, seed):
    coarse = {"data.init_args.coarse": True}
    miou = 0.4 if start == "finished" else None
    first = write_run(tmp_path / "coarse" / "version_0", miou, steps=(10,), config=coarse)
    config = {"ckpt_path": str(first / "checkpoints" / "last.ckpt")}
    write_run(tmp_path / "after" / "version_0", 0.6, steps=(20,), config=config)
    write_run(tmp_path / "scratch" / "version_0", 0.5, seed, steps=(20,))
    for name, score in (("after", 0.3), ("scratch", 0.2)):
        last = {"ckpt_path": str(tmp_path / name / "version_0" / "checkpoints" / "last.ckpt")}
        folder = tmp_path / f"{name}_test" / "version_0"
        write_run(folder, score, command="test", config=last)
    names = ["after", "scratch", "after_test", "scratch_test"]
    places = [tmp_path / name for name in names] if start == "not given" else [tmp_path]
    (trained, tested), problems = compared(*places)
    assert [s.miou.mean for s in trained.settings] == [0.6, 0.5, *[0.4] * (start == "finished")]
    assert [s.miou.mean for s in tested.settings] == [0.3, 0.2]
    assert problems == []


def test_a_run_that_is_resumed_from_a_run_that_is_not_given_is_no_other_setting(tmp_path):
    gone = {"ckpt_path": "elsewhere/a/version_0/checkpoints/last.ckpt"}
    write_run(tmp_path / "a" / "version_1", 0.6, config=gone)
    write_run(tmp_path / "b" / "version_0", 0.5, seed=1)
    (comparison,), _ = compared(tmp_path)
    assert [sorted(setting.runs) for setting in comparison.settings] == [["0", "1"]]


def test_trainings_that_took_the_weights_of_different_runs_are_two_settings(tmp_path):
    places = ("ade", "cityscapes", "grid/window_4/seed0", "grid/window_8/seed0")
    for number, place in enumerate(places):
        weights = {"model.network.weights_path": f"runs/{place}/version_0/checkpoints/best.ckpt"}
        write_run(tmp_path / f"from_{number}" / "version_0", 0.5, config=weights)
    (comparison,), problems = compared(tmp_path)
    assert len(comparison.settings) == 4
    assert problems == []


def test_weights_are_told_apart_by_the_trainings_and_not_by_their_evaluations(tmp_path):
    weights = {"model.network.weights_path": "weights/r18.pth"}
    for seed in (0, 1):
        run = write_run(tmp_path / f"a{seed}" / "version_0", 0.5, seed, config=weights)
        config = {"ckpt_path": str(run / "checkpoints" / "last.ckpt")}
        config |= weights if seed else {}  # the other one with the checkpoint's own config
        write_run(tmp_path / f"test{seed}" / "version_0", 0.4, command="test", config=config)
    (_, tested), problems = compared(tmp_path)
    assert [sorted(setting.runs) for setting in tested.settings] == [["0", "1"]]
    assert problems == []


def test_a_grid_that_lacks_an_option_does_not_take_it_from_another(tmp_path):
    for grid, config in (("old", {}), ("new", {"data.train_on_val": True})):
        for seed in (0, 1):
            run = tmp_path / grid / "base" / f"seed{seed}" / "version_0"
            write_run(run, 0.5, seed, config=config)
    [comparison], problems = compared(tmp_path)
    assert [len(setting.runs) for setting in comparison.settings] == [2, 2]
    assert problems == []


def test_cells_whose_files_have_one_name_are_two_settings(tmp_path):
    for cell in ("dino", "imagenet"):
        weights = {"model.network.weights_path": f"weights/{cell}/resnet18.pth"}
        write_run(tmp_path / cell / "seed0" / "version_0", 0.5, config=weights)
    (comparison,), problems = compared(tmp_path)
    assert {setting.label for setting in comparison.settings} == {"dino", "imagenet"}
    assert problems == []


def test_of_two_runs_with_a_seed_the_one_that_ended_later_counts(tmp_path):
    later = write_run(tmp_path / "a" / "version_0", 0.6)
    sooner = write_run(tmp_path / "b" / "version_0", 0.5)
    os.utime(sooner / "results.json", (1, 1))
    (comparison,), problems = compared(tmp_path)
    assert [run.folder for run in comparison.settings[0].runs.values()] == [later]
    assert f"{sooner} is left out: {later}, which is later" in problems[0]


def test_evaluations_are_told_apart_by_their_trainings(tmp_path):
    for seed, lr in ((0, 0.1), (1, 0.1), (0, 0.2)):
        name = f"lr{lr}_{seed}"
        rate = {"model.optimizer.init_args.lr": lr}
        write_run(tmp_path / name / "version_0", 0.5, seed, config=rate)
        for weights in ("best", "last"):
            path = {"ckpt_path": f"{name}/version_0/checkpoints/{weights}.ckpt"}
            folder = tmp_path / f"{name}_{weights}" / "version_0"
            write_run(folder, 0.4, command="test", config=path)
    comparisons, problems = compared(tmp_path)
    found = {setting.label: sorted(setting.runs) for setting in comparisons[1].settings}
    assert found == {
        "optimizer.lr=0.1, checkpoint=best.ckpt": ["0", "1"],
        "optimizer.lr=0.1, checkpoint=last.ckpt": ["0", "1"],
        "optimizer.lr=0.2, checkpoint=best.ckpt": ["0"],
        "optimizer.lr=0.2, checkpoint=last.ckpt": ["0"],
    }
    assert problems == []


def test_steps_are_counted_as_they_were_logged(tmp_path):
    from reporting.run_folders import read_curves

    path = tmp_path / "metrics.csv"
    # Lightning's own count starts at 0 and comes with an epoch.
    path.write_text("epoch,step,train/loss,val/miou\n0,9,0.5,\n,10,,0.25\n0,19,nan,\n0,29,0.1\n")
    problems = []
    assert read_curves(path, problems) == {"train/loss": {10: 0.5}, "val/miou": {10: 0.25}}
    assert problems == [f"{path}: line 5 is broken and left out"]


def test_a_line_that_was_cut_within_a_number_is_left_out(tmp_path):
    from reporting.run_folders import read_curves

    path = tmp_path / "metrics.csv"
    path.write_text("step,val/miou\n10,0.25\n20,0.6")  # of 0.6125
    problems = []
    assert read_curves(path, problems) == {"val/miou": {10: 0.25}}
    assert problems == [f"{path}: its last line is cut off and left out"]


def test_names_are_only_names(tmp_path):
    evil = "<b>|x $y_$`*[a](http://a)"  # $y_$ is no formula
    config = context('"><script>alert(1)</script>')
    write_run(tmp_path / "a" / "version_0", 0.5, **{evil: 0.5, "_c": None})
    write_run(tmp_path / "b" / "version_0", 0.4, config=config, **{evil: 0.4, "_c": None})
    assert report(tmp_path, "--output", tmp_path / "out", "--title", "<i>&") == 0
    page = Reader((tmp_path / "out" / "report.html").read_text())
    assert {"b", "i"}.isdisjoint(page.tags)
    assert page.tags.count("script") == 1  # the one that sorts
    assert {evil, "<i>&", "_c"} <= set(page.text)
    assert sum("alert" in text for text in page.text) > 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<b>" not in text
    assert "<script>" not in text.split("```")[0]
    escaped = r"&lt;b&gt;\|x \$y\_\$\`\*\[a\](http://a)"
    assert rows(text, escaped) == [[escaped, "**50.00**", "40.00"]]


def test_the_page_needs_nothing_else_and_is_always_the_same(grid, tmp_path):
    for name in ("one", "two"):
        assert report(grid, "--output", tmp_path / name) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    text = files["report.html"].decode()
    page = Reader(text)
    assert {urlparse(link).scheme for link in page.links} == {"", "data"}
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    shown = re.findall(r"\]\(([^)]+\.png)\)", files["report.md"].decode())
    assert set(shown) == {name for name in files if name.endswith(".png")}
    # Scores, classes, curves, cost and two panels.
    assert len(shown) == 6
    assert len([name for name in files if name.endswith(".svg")]) == 4
    assert len([link for link in page.links if link.startswith("data:")]) == 6


def test_the_confusion_is_that_of_the_best_over_its_runs(grid, tmp_path, monkeypatch):
    import report as script

    drawn = []
    draw = script.draw_confusion
    monkeypatch.setattr(script, "draw_confusion", lambda *args: drawn.append(args) or draw(*args))
    for version, name in ((0, "isa"), (2, "isa"), (0, "none")):
        path = grid / name / f"version_{version}" / "confusion_val.csv"
        path.write_text(f"road,car\n{version + 1},2\n3,4\n")
    (grid / "isa" / "version_1" / "confusion_val.csv").write_text("road,car\n1,2\n")
    assert report(grid, "--output", tmp_path / "out") == 0
    ((counts, names),) = drawn
    assert counts.tolist() == [[4, 4], [6, 8]]
    assert names == ["road", "car"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "context=isa, pixels of 2 of 3 runs" in text
    assert "version_1/confusion_val.csv is left out: 2 classes need" in text.replace("\\", "")


def test_what_is_missing_or_broken_is_said(grid, tmp_path):
    (grid / "isa" / "version_0" / "results.json").write_text('{"scores": {}}')
    (grid / "isa" / "version_1" / "metrics.csv").write_text("a,b\n1,2\n")
    (grid / "isa" / "version_1" / "panels" / "val_step=000020.png").write_bytes(b"no")
    (grid / "isa" / "version_2" / "metrics.csv").unlink()
    (grid / "none" / "version_0" / "config.yaml").write_text("a: [")
    assert report(grid, "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert "version_0/results.json is left out: it lacks what a result has: 'miou'" in text
    assert "version_1/metrics.csv is left out: it has no column 'step'" in text
    assert "none/version_0/config.yaml is left out: while parsing" in text
    assert "none/version_0 is left out: without config.yaml" in text
    assert "panels/val_step=000020.png is left out: cannot identify image" in text
    assert "No pictures of isa" in text
    assert "no metrics.csv holds train/loss" in text
    assert "no run of isa holds confusion_val.csv" in text
    assert dict(zip(rows(text, "setting")[0], rows(text, "isa")[0], strict=True))["n"] == "2"


def test_a_report_of_unfinished_runs_lists_them(tmp_path):
    write_run(tmp_path / "runs" / "a" / "version_0")
    failed = write_run(tmp_path / "runs" / "b" / "version_0")
    (failed / "metrics.csv").unlink()
    assert report(tmp_path / "runs", "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert rows(text, str(failed)) == [[str(failed), "fit", "nothing logged", "-"]]


def test_a_wrong_command_line_is_refused(tmp_path, grid, capsys):
    (tmp_path / "empty").mkdir()
    assert report(tmp_path / "empty", "--output", tmp_path / "out") == 2
    assert f"no run folder in {tmp_path / 'empty'}" in capsys.readouterr().err
    assert report(tmp_path / "nowhere", "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'nowhere'} is no folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert report(grid, "--output", tmp_path / "file") == 2
    assert f"cannot write {tmp_path / 'file'}" in capsys.readouterr().err


def test_curves_are_smoothed_and_averaged():
    from reporting.figures import mean_curve, smooth

    ramp = {step: float(step) for step in range(1, 41)}  # 40 points: over 2
    smoothed = smooth(ramp)
    assert (smoothed[1], smoothed[2], smoothed[40]) == (1.0, 1.5, 39.5)
    assert mean_curve([{1: 1.0, 2: 2.0}, {2: 4.0, 3: 9.0}]) == {2: 3.0}
    assert mean_curve([]) == {}


def test_an_exported_network_tells_neither_steps_nor_parameters(tmp_path):
    folder = write_run(tmp_path / "onnx" / "version_0", 0.5, command="validate")
    record = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**record, "step": None, "parameters": None}))
    assert report(tmp_path / "onnx", "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "left out" not in text
    assert "| 50.00 |" in text
