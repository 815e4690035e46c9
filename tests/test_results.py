"""What the project shows of runs: kept in docs/results, where the tables come from."""

import json
import shutil
from collections import Counter
from inspect import signature
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from PIL import Image
from test_report import context, rows, write_run

from isanet_pl.data import CamVid, SegmentationDataModule
from isanet_pl.models import ISANet
from isanet_pl.module import SegmentationModule

pytestmark = pytest.mark.usefixtures("scripts_on_path")


ROOT = Path(__file__).parent.parent


def marks(name, inside="old"):
    return f"<!-- {name}: written by a script -->\n{inside}\n<!-- end of {name} -->\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a README and a page with a block, where scripts run."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    text = f"before\n{marks('mine results')}after\n"
    (tmp_path / "docs" / "results" / "README.md").write_text(text)
    (tmp_path / "README.md").write_text("nothing yet\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page(place):
    return (place / "docs" / "results" / "README.md").read_text()


def results(*arguments):
    from results import main

    return main(list(map(str, arguments)))


def test_the_block_holds_the_numbers_of_the_runs(place):
    for seed, miou in enumerate((0.5, 0.6, 0.7)):
        write_run(place / "runs" / "isa" / f"version_{seed}", miou, seed)
    write_run(place / "runs" / "none" / "version_0", 0.25, config=context("none"))
    write_run(place / "runs" / "dense" / "version_0", config=context("dense"))  # was killed
    assert results("--add", "mine", "runs") == 0
    text = page(place)
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    [head, _] = rows(text, "setting")
    best = dict(zip(head, rows(text, "context=isa")[0], strict=True))
    wanted = {"n": "3", "val mIoU": "**60.00 ± 10.00**", "best val mIoU": "20.00 ± 0.00"}
    assert wanted.items() <= best.items()
    assert best["images/s"] == "15.0"
    assert len(rows(text, "context=isa")) == 4  # and a row for each seed
    assert "context=dense" not in text
    assert text.count("isanet-pl fit") == 4
    file = "mine.camvid-val-at-the-end-of-training.png"
    assert f"({file})" in text
    with Image.open(place / "docs" / "results" / file) as picture:
        assert picture.width > 500
    results()
    assert page(place) == text  # a second time changes nothing


def test_new_runs_take_the_place_of_those_before(place):
    isa = write_run(place / "runs" / "isa" / "version_0", 0.5)
    write_run(place / "runs" / "none" / "version_0", 0.25, config=context("none"))
    results("--add", "mine", "runs")
    results("--add", "mine", isa, "--panel")
    assert "context=none" not in page(place)
    names = [path.name for path in (place / "docs" / "results").iterdir()]
    assert sorted(names) == ["README.md", "mine.json", "mine.panel.png"]


def test_images_are_published_on_demand_alone(place):
    isa = write_run(place / "runs" / "isa" / "version_0", 0.5)
    results("--add", "mine", isa)
    names = [path.name for path in (place / "docs" / "results").iterdir()]
    assert sorted(names) == ["README.md", "mine.json"]


def test_an_evaluation_stands_beside_its_training(place):
    trained = write_run(place / "runs" / "isa" / "version_0", 0.5)
    (trained / "checkpoints").mkdir()
    for number, scales in enumerate([[1.0], [1.0, 1.5]]):
        config = {"ckpt_path": str(trained / "checkpoints" / "best.ckpt")}
        config["model.inference.scales"] = scales
        folder = place / "runs" / "test" / f"version_{number}"
        write_run(folder, 0.4 + number / 10, command="test", config=config, car=None)
    results("--add", "mine", "runs")
    text = page(place)
    assert "**CamVid val at the end of training**" in text
    assert "**CamVid test by isanet-pl test**" in text
    assert rows(text, "car") == [["car", "-", "-"]]  # of the last comparison
    assert "(mine.camvid-test-by-isanet-pl-test.png)" in text
    kept = json.loads((place / "docs" / "results" / "mine.json").read_text())
    assert [comparison["split"] for comparison in kept] == ["val", "test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--add", "mine"), "a name and run folders"),
        (("--add", "mine", "nowhere"), "nowhere is no folder"),
        (("--add", "mine", "killed"), "no run is finished in killed"),
    ],
)
def test_what_is_no_finished_run_is_refused(arguments, message, place, capsys):
    write_run(place / "killed" / "version_0")
    with pytest.raises(SystemExit) as stop:
        results(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_without_the_block_is_refused(place):
    write_run(place / "runs" / "isa" / "version_0", 0.5)
    with pytest.raises(SystemExit, match=r"lacks the lines .*other results"):
        results("--add", "other", "runs")


def test_the_readme_has_the_last_table(place):
    write_run(place / "runs" / "isa" / "version_0", 0.5)
    (place / "README.md").write_text(f"before\n{marks('mine summary')}after\n")
    assert results("--add", "mine", "runs") == 0
    text = (place / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert [row[:3] for row in rows(text, "isa")] == [["isa", "1", "50.00"]]
    assert "old" not in text
    assert "isanet-pl fit" not in text


@pytest.mark.parametrize("block", ["other summary", "Cityscapes overview"])
def test_a_block_of_the_readme_that_nothing_is_stored_for(place, block, capsys):
    write_run(place / "runs" / "isa" / "version_0", 0.5)
    (place / "README.md").write_text(marks(block))
    with pytest.raises(SystemExit) as stop:
        results("--add", "mine", "runs")
    assert stop.value.code == 2
    assert f"'{block}', but docs/results nothing" in capsys.readouterr().err


FIELD = {"model.inference.scales": [0.5, 0.75, 1, 1.25, 1.5, 1.75], "model.inference.flip": True}
"""The field's views."""


def evaluate(folder, miou, trained, command="test", weights="last.ckpt", step=20, **config):
    """Writes the run folder of an evaluation of a training's checkpoint."""
    config["ckpt_path"] = f"{trained}/checkpoints/{weights}"
    write_run(folder, miou, command=command, config=config)
    result = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(result | {"step": step}))


OTHER_WAYS = [
    {"model.inference.scales": [2.0]},
    {"model.inference.flip": True},
    {"model.inference.mode": "slide", "model.inference.crop_size": [64, 64]},
    {"trainer.limit_test_batches": 5},
    {"trainer.limit_test_batches": 0.5},
    {"weights": "best.ckpt", "step": 10},
    {"model.inference.pad_multiple": 1},
    {"data.init_args.base_size": [960, 720]},
    {"data.init_args.label_map": {0: 1}},
]
"""Better scores, measured in other ways."""


def overview_of(place):
    """Returns the README's overview of CamVid, a dict for each row."""
    (place / "README.md").write_text(marks("CamVid overview"))
    assert results("--add", "mine", "runs") == 0
    return table_rows(place / "README.md")


def table_rows(path):
    """Returns the rows of the only table of a page, a dict for each."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, cells, strict=True)) for cells in body]


def test_the_overview_has_a_row_for_each_way_to_train(place):
    runs = place / "runs"
    for seed, miou in enumerate((0.5, 0.6)):
        line = f"--config a/isa.yaml --data.root d --seed_everything {seed} --name isa/seed{seed}"
        trained = write_run(runs / f"isa{seed}" / "version_0", miou, seed, options=line)
        evaluate(runs / f"test{seed}" / "version_0", miou - 0.1, trained)
        evaluate(runs / f"field{seed}" / "version_0", miou + 0.1, trained, **FIELD)
        for number, other in enumerate(OTHER_WAYS):
            evaluate(runs / f"other{number}_{seed}" / "version_0", 0.9, trained, **other)
    line = "--config a/isa.yaml --config b/none.yaml --model.freeze_bn true"
    write_run(runs / "none" / "version_0", 0.8, config=context("none"), options=line)
    (place / "docs" / "results" / "published.yaml").write_text(
        "CamVid:\n  - {name: Net, test: 69.1, source: a paper}\n"
    )
    isa, none, net = overview_of(place)  # what has no test score comes after
    assert none == {
        "training": "isa + none, freeze_bn=true", "n": "1", "steps": "20",
        "val": "**80.00**", "val ms+flip": "-", "test": "-", "test ms+flip": "-",
        "time, or source": "2 min, a machine",
    }  # fmt: skip
    assert isa == none | {
        "training": "isa", "n": "2", "val": "55.00 ± 7.07", "test": "**45.00 ± 7.07**",
        "test ms+flip": "**65.00 ± 7.07**",
    }  # fmt: skip
    assert net["training"] == "literature: Net"
    assert (net["test"], net["time, or source"]) == ("69.1", "a paper")


def test_the_overview_names_what_changes_the_training(place):
    options = "-c a/isa.yaml --data.init_args.root d --data.num_workers 4 --data.cache /x"
    options += (
        " --wandb auto --data.init_args.flip=false --checkpoint.monitor val/loss --data CamVid"
    )
    write_run(place / "runs" / "isa" / "version_0", 0.9, options=options)
    [row] = overview_of(place)
    assert row["training"] == "isa, flip=false"


def test_a_training_that_starts_from_another_one_has_a_row_of_its_own(place):
    starts = (
        "runs/coarse/version_0/checkpoints/last.ckpt",
        "runs/fine/version_0/checkpoints/a.ckpt",
    )
    for seed, start in enumerate((None, *starts)):  # the last one is only resumed
        options = "--config a/isa.yaml" + (f" --ckpt_path {start}" if start else "")
        config = {"ckpt_path": start} if start else {}
        folder = place / "runs" / "fine" / f"version_{seed}"
        write_run(folder, 0.5 + seed / 10, seed, config=config, options=options)
    found = {(row["training"], row["n"], row["val"]) for row in overview_of(place)}
    assert found == {
        ("isa", "2", "**60.00 ± 14.14**"),
        ("isa, from coarse/version_0", "1", "**60.00**"),
    }


@pytest.mark.parametrize(
    ("weights", "label"),
    [("w/resnet18.pth", "isa"), ("a/converted.ckpt", "isa, from a/converted.ckpt")],
)
def test_a_training_that_starts_from_a_whole_network_says_so(place, weights, label):
    options = f"--config a/isa.yaml --model.network.weights_path {weights}"
    write_run(place / "runs" / "isa" / "version_0", 0.9, options=options)
    [row] = overview_of(place)
    assert row["training"] == label


def test_options_go_by_their_last_names_in_the_overview():
    from reporting.labels import GROUPS

    owners = [ISANet, SegmentationModule, SegmentationDataModule, CamVid, Trainer]
    names = [set(signature(owner).parameters) for owner in owners]
    names[3] -= names[2]
    given = {"num_classes", "class_names", "palette"}  # by the data, and by no user
    assert [
        n for n, count in Counter(n for g in names for n in g - given).items() if count > 1
    ] == []
    assert len(GROUPS) == 4


def test_what_all_rows_of_an_overview_share_is_said_once(place):
    for number, name in enumerate(("isa", "none")):
        line = f"--config a/{name}.yaml --model.network.last_stage 3 --data.flip {number}"
        folder = place / "runs" / name / "version_0"
        write_run(folder, 0.5 - number / 10, config=context(name), options=line)
    assert [row["training"] for row in overview_of(place)] == ["isa, flip=0", "none, flip=1"]
    assert "All with last_stage=3:\n\n| training |" in (place / "README.md").read_text()


def test_a_row_of_the_overview_leads_to_its_section_and_has_its_title(place):
    page = place / "docs" / "results" / "README.md"
    page.write_text("# All\n\n## CamVid, larger crops (540x720)\n" + page.read_text())
    link = "(docs/results/README.md#camvid-larger-crops-540x720)"

    def train(batch_size, miou):
        write_run(
            place / "runs" / f"isa{batch_size}" / "version_0", miou,
            options=f"--config isa.yaml --data.batch_size {batch_size}",
            config={"data.batch_size": batch_size},
        )  # fmt: skip
        return [row["training"] for row in overview_of(place)]

    assert train(1, 0.6) == [f"[isa, larger crops (540x720)]{link}"]
    # Two of one section are told apart by their options.
    assert train(2, 0.5) == [f"[isa, batch_size={n}]{link}" for n in (1, 2)]


def test_results_with_a_table_of_their_own_are_in_no_other(place):
    write_run(place / "runs" / "isa" / "version_0", 0.5, options="--config a")
    write_run(place / "more" / "none" / "version_0", 0.6, options="--config b")
    page = place / "docs" / "results" / "README.md"
    page.write_text(page.read_text() + marks("more results"))
    (place / "docs" / "results" / "published.yaml").write_text(
        "CamVid:\n  - {name: Net, test: 69.1, source: a paper}\n"
    )
    for name, runs in (("mine", "runs"), ("more", "more")):
        assert results("--add", name, runs) == 0
    (place / "README.md").write_text(marks("CamVid overview") + marks("more overview"))
    results()
    text = (place / "README.md").read_text()
    firsts = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert firsts == ["training", "a", "literature: Net", "training", "b"]


def test_the_overview_gives_the_mean_time(place):
    for seed, seconds in enumerate((60, 180)):
        folder = write_run(place / "runs" / f"seed{seed}", 0.5, seed, options="--config a")
        result = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(result | {"seconds": seconds}))
    [row] = overview_of(place)
    assert (row["n"], row["time, or source"]) == ("2", "2 min, a machine")


def test_the_overview_counts_no_seed_twice(place):
    for name, miou in (("one", 0.5), ("again", 0.6)):  # as on two machines
        write_run(place / name / "isa" / "version_0", miou, options="--config a")
        page = place / "docs" / "results" / "README.md"
        page.write_text(page.read_text() + marks(f"{name} results"))
        assert results("--add", name, name) == 0
    (place / "README.md").write_text(marks("CamVid overview"))
    results()
    found = table_rows(place / "README.md")
    assert [(row["n"], row["val"]) for row in found] == [("1", "**60.00**"), ("1", "50.00")]


def test_the_overview_tells_saved_configs_apart(place):
    for name, miou in (("isa", 0.5), ("none", 0.8)):
        line = f"--config runs/{name}/version_7/config.yaml"
        write_run(place / "runs" / name / "version_0", miou, config=context(name), options=line)
    assert [(row["training"], row["n"]) for row in overview_of(place)] == [
        ("runs/none/version_7/config.yaml", "1"),
        ("runs/isa/version_7/config.yaml", "1"),
    ]


def test_of_two_equal_evaluations_the_first_counts_and_not_the_better(place):
    trained = write_run(place / "runs" / "isa" / "version_0", 0.5, options="--config a")
    evaluate(place / "runs" / "test" / "version_0", 0.4, trained)
    evaluate(place / "runs" / "test" / "version_1", 0.6, trained, **{"trainer.precision": 16})
    [row] = overview_of(place)
    assert row["test"] == "**40.00**"


def test_two_trainings_of_one_folder_are_refused(place, capsys):
    """As on two machines, whose first runs have one name."""
    write_run(place / "runs" / "isa" / "version_0", 0.5, options="--config a")
    assert len(overview_of(place)) == 1
    store = place / "docs" / "results"
    text = (store / "mine.json").read_text()
    (store / "again.json").write_text(text)
    page = store / "README.md"
    page.write_text(page.read_text() + marks("again results"))
    assert results() == 0  # the same one, under another name
    (store / "again.json").write_text(
        text.replace("isanet-pl fit", "isanet-pl fit --ema_decay 0.9")
    )
    with pytest.raises(SystemExit):
        results()
    assert "two trainings are kept as runs/isa/version_0" in capsys.readouterr().err


def test_the_overview_has_no_val_score_of_a_training_on_val(place):
    both = {"data.train_on_val": True}
    trained = write_run(
        place / "runs" / "both" / "version_0", 0.9, config=both, options="--config a"
    )
    evaluate(place / "runs" / "val" / "version_0", 0.9, trained, command="validate")
    evaluate(place / "runs" / "test" / "version_0", 0.6, trained, step=25)
    [row] = overview_of(place)
    assert (row["val"], row["test"]) == ("-", "**60.00**")
    assert row["steps"] == "25"  # after the last validation


def test_a_row_of_the_overview_is_of_one_step(place):
    trained = write_run(place / "runs" / "isa" / "version_0", 0.7, options="--config a")
    evaluate(place / "runs" / "before" / "version_0", 0.5, trained)  # as the last validation
    evaluate(place / "runs" / "last" / "version_0", 0.6, trained, step=25)
    [row] = overview_of(place)
    assert (row["steps"], row["val"], row["test"]) == ("25", "-", "**60.00**")


def test_the_overview_sees_how_a_training_validates(place):
    write_run(place / "runs" / "isa" / "version_0", 0.9, config=FIELD, options="--config a")
    [row] = overview_of(place)
    assert (row["val"], row["val ms+flip"]) == ("-", "**90.00**")


def test_the_overview_counts_scales_from_that_of_the_training(place):
    trained = write_run(
        place / "runs" / "isa" / "version_0", 0.5, options="--config a",
        config={"model.inference.scales": [1.5]},
    )  # fmt: skip
    sizes = {"one": [1.5], "small": [1.0]}
    for number, (name, scales) in enumerate(sizes.items()):
        views = {"model.inference.scales": scales}
        evaluate(place / "runs" / name / "version_0", 0.6 + 0.1 * number, trained, **views)
    six = FIELD | {"model.inference.scales": [0.75, 1.125, 1.5, 1.875, 2.25, 2.625]}
    evaluate(place / "runs" / "six" / "version_0", 0.8, trained, **six)
    evaluate(place / "runs" / "field" / "version_0", 0.9, trained, **FIELD)
    [row] = overview_of(place)
    assert (row["val"], row["test"]) == ("**50.00**", "**60.00**")
    assert (row["val ms+flip"], row["test ms+flip"]) == ("-", "**80.00**")


def test_the_tables_of_this_project_are_those_of_its_records(tmp_path):
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    results("--store", tmp_path / "docs" / "results", "--readme", tmp_path / "README.md")
    for name in ("README.md", "docs/results/README.md"):
        assert (tmp_path / name).read_text("utf-8") == (ROOT / name).read_text("utf-8")
