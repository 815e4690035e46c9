"""What the README shows of runs: kept in docs/results, where the tables come from."""

import json

import pytest
from PIL import Image
from test_report import context, rows, write_run

pytestmark = pytest.mark.usefixtures("scripts_on_path")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a README with a block, where scripts run."""
    marks = "<!-- mine results: written by a script -->", "<!-- end of mine results -->"
    (tmp_path / "README.md").write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(*arguments):
    from results import main

    return main(list(map(str, arguments)))


def test_the_block_holds_the_numbers_of_the_runs(place):
    for seed, miou in enumerate((0.5, 0.6, 0.7)):
        write_run(place / "runs" / "isa" / f"version_{seed}", miou, seed)
    write_run(place / "runs" / "none" / "version_0", 0.25, config=context("none"))
    write_run(place / "runs" / "dense" / "version_0", config=context("dense"))  # was killed
    assert results("--add", "mine", "runs") == 0
    text = (place / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    [head, _] = rows(text, "setting")
    best = dict(zip(head, rows(text, "network.context=isa")[0], strict=True))
    wanted = {"n": "3", "val mIoU": "**60.00 ± 10.00**", "best val mIoU": "20.00 ± 0.00"}
    assert wanted.items() <= best.items()
    assert best["images/s"] == "15.0"
    assert len(rows(text, "network.context=isa")) == 4  # and a row for each seed
    assert "network.context=dense" not in text
    assert text.count("isanet-pl fit") == 4
    file = "docs/results/mine.camvid-val-at-the-end-of-training.png"
    assert f"({file})" in text
    with Image.open(place / file) as picture:
        assert picture.width > 500
    results()
    assert (place / "README.md").read_text() == text  # a second time changes nothing


def test_new_runs_take_the_place_of_those_before(place):
    isa = write_run(place / "runs" / "isa" / "version_0", 0.5)
    write_run(place / "runs" / "none" / "version_0", 0.25, config=context("none"))
    results("--add", "mine", "runs")
    results("--add", "mine", isa)
    assert "network.context=none" not in (place / "README.md").read_text()
    names = sorted(path.name for path in (place / "docs" / "results").iterdir())
    assert names == ["mine.json", "mine.panel.png"]


def test_an_evaluation_stands_beside_its_training(place):
    trained = write_run(place / "runs" / "isa" / "version_0", 0.5)
    (trained / "checkpoints").mkdir()
    for number, scales in enumerate([[1.0], [1.0, 1.5]]):
        config = {"ckpt_path": str(trained / "checkpoints" / "best.ckpt")}
        config["model.inference.scales"] = scales
        folder = place / "runs" / "test" / f"version_{number}"
        write_run(folder, 0.4 + number / 10, command="test", config=config, car=None)
    results("--add", "mine", "runs")
    text = (place / "README.md").read_text()
    assert "**CamVid val at the end of training**" in text
    assert "**CamVid test by isanet-pl test**" in text
    assert rows(text, "car") == [["car", "-", "-"]]  # of the last comparison
    assert "(docs/results/mine.camvid-test-by-isanet-pl-test.png)" in text
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


def test_a_readme_without_the_block_is_refused(place):
    write_run(place / "runs" / "isa" / "version_0", 0.5)
    with pytest.raises(SystemExit, match=r"lacks the lines .*other results"):
        results("--add", "other", "runs")
