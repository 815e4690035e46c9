"""What the report's pictures show, read from their axes."""

import pytest
from test_report import compared, context, write_run

pytestmark = pytest.mark.usefixtures("scripts_on_path")


@pytest.fixture
def comparison(tmp_path):
    """Two seeds of isa at 50 and 70 % and 10 and 20 images/s, one of none at 30 %."""
    for seed, miou in enumerate((0.5, 0.7)):
        steps = (10 + 10 * seed, 20)
        write_run(tmp_path / "isa" / f"version_{seed}", miou, seed, steps, road=0.9, car=0.2)
    write_run(tmp_path / "none" / "version_0", 0.3, config=context("none"), road=0.8, car=0.7)
    [found], _ = compared(tmp_path)
    return found


def bars(container):
    """Returns where the ends of an errorbar's line lie, or None."""
    _, _, lines = container
    return [line.get_segments()[0].tolist() for line in lines]


def test_scores_are_percent_beside_their_names(comparison):
    from reporting.figures import draw_scores

    [axes] = draw_scores(comparison).axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["context=isa", "context=none"]
    best, other = axes.containers
    assert best[0].get_xdata() == pytest.approx([60])
    assert best[0].get_ydata() == pytest.approx([0])  # the row of its name
    (ends,) = bars(best)
    assert [x for x, _ in ends] == pytest.approx([60 - 200**0.5, 60 + 200**0.5])
    assert other[0].get_xdata() == pytest.approx([30])
    assert bars(other) == []  # one seed has no spread
    strokes = [sorted(line.get_xdata()) for line in axes.lines if line.get_markersize() == 10]
    assert strokes == [pytest.approx([50, 70]), pytest.approx([30])]
    assert [text.get_text() for text in axes.texts] == ["60.0", "30.0"]
    top, bottom = axes.get_ylim()
    assert top > bottom  # the best is above
    assert axes.get_xlabel() == "val mIoU, %"


def test_classes_have_a_bar_for_each_setting(comparison):
    from reporting.figures import draw_classes

    figure = draw_classes(comparison)
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["road", "car"]
    found = [
        (round(bar.get_width()), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches
    ]
    assert found == [(90, 0), (20, 1), (80, 0), (70, 1)]  # width, row of the class
    isa, none = (axes.patches[i].get_facecolor() for i in (0, 2))
    assert isa != none
    [legend] = figure.legends
    named = {
        text.get_text(): bar.get_facecolor()
        for text, bar in zip(legend.texts, legend.legend_handles, strict=True)
    }
    assert named == {"context=isa": isa, "context=none": none}


def test_settings_of_one_colour_have_other_bars(tmp_path):
    from reporting.figures import COLOURS, draw_classes

    for number in range(len(COLOURS)):
        config = {"model.optimizer.lr": number + 1}
        write_run(tmp_path / f"fit{number}" / "version_0", number / 10, config=config)
        config["model.optimizer.lr"] += 1
        write_run(tmp_path / f"test{number}" / "version_0", 0.5, command="test", config=config)
    comparisons, _ = compared(tmp_path)
    assert max(s.number for c in comparisons for s in c.settings) == len(COLOURS)
    looks = {
        (bar.get_facecolor(), bar.get_hatch())
        for c in comparisons
        for bar in draw_classes(c).axes[0].patches
    }
    assert len(looks) == len(COLOURS) + 1


def test_small_differences_of_single_runs_look_like_that(tmp_path):
    from reporting.figures import draw_scores

    for name, miou in (("isa", 0.601), ("none", 0.600)):
        write_run(tmp_path / name / "version_0", miou, config=context(name))
    [comparison], _ = compared(tmp_path)
    [axes] = draw_scores(comparison).axes
    low, high = axes.get_xlim()
    assert high - low == pytest.approx(3)
    assert {c[0].get_markerfacecolor() for c in axes.containers} == {"none"}


def test_of_many_classes_those_that_differ_most_are_drawn(comparison, monkeypatch):
    from reporting import figures

    monkeypatch.setattr(figures, "MOST_CLASSES", 1)
    assert figures.differing(comparison.classes, comparison.settings) == ["car"]


def test_curves_are_those_of_their_panels(comparison):
    from reporting.figures import draw_curves

    score, loss, rate = draw_curves(comparison).axes
    # Seeds thin, their mean thick where both have a point; then the setting of one seed.
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in score.lines]
    assert drawn == [
        ([10, 20], [10, 20]),
        ([20], [20]),
        ([20], [20]),
        ([10, 20], [10, 20]),
    ]
    widths = [line.get_linewidth() for line in score.lines]
    assert widths[0] == widths[1] < widths[2] == widths[3]
    assert list(loss.lines[0].get_ydata()) == pytest.approx([1 / 10, 1 / 20])
    assert {tuple(line.get_ydata()) for line in rate.lines} <= {(0.1, 0.1), (0.1,)}


def test_cost_stands_against_the_score(comparison):
    from reporting.figures import draw_cost

    parameters, gmacs, context, time = draw_cost(comparison).axes
    points = {
        axes.get_xlabel(): [
            (float(c[0].get_xdata()[0]), float(c[0].get_ydata()[0])) for c in axes.containers
        ]
        for axes in (parameters, gmacs, context, time)
    }
    assert points["million parameters"] == [(2.5, pytest.approx(60)), (2.5, pytest.approx(30))]
    assert points["GMACs an image"] == [(4.25, pytest.approx(60)), (4.25, pytest.approx(30))]
    (isa, _), (none, _) = points["training, ms an image"]
    # Images/s of each run are the median of what it logged: 15 and 20, 15.
    assert isa == pytest.approx(1000 / 17.5)
    assert none == pytest.approx(1000 / 15)
