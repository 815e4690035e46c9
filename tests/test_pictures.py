"""Pictures of scores say what the numbers say, and can be read."""

import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from isanet_pl.pictures import draw_class_scores, draw_confusion, draw_panels, render


def labels_of(axis, which):
    return [label.get_text() for label in getattr(axis, f"get_{which}ticklabels")()]


def overlapping(labels, renderer):
    boxes = [label.get_window_extent(renderer) for label in labels]
    return [
        (a.get_text(), b.get_text())
        for a, b, first, second in zip(labels, labels[1:], boxes, boxes[1:], strict=False)
        if first.overlaps(second)
    ]


def test_confusion_rows_are_percent_of_the_true_pixels():
    counts = torch.tensor([[90, 10, 0], [0, 0, 0], [1, 299, 700]])
    axis = draw_confusion(counts, ["sky", "road", "car"]).axes[0]
    assert labels_of(axis, "x") == labels_of(axis, "y") == ["sky", "road", "car"]
    shown = np.ma.filled(axis.images[0].get_array(), np.nan)
    expected = [[90, 10, 0], [math.nan] * 3, [0.1, 29.9, 70]]
    np.testing.assert_allclose(shown, expected)
    cells = {tuple(text.get_position()): text.get_text() for text in axis.texts}
    # (prediction, truth); what rounds to nothing is left empty
    assert cells == {(0, 0): "90", (1, 0): "10", (1, 2): "30", (2, 2): "70"}


@pytest.mark.parametrize("num_classes", [2, 30, 150])
def test_confusion_matrix_is_legible_at_any_number_of_classes(num_classes):
    names = [f"class number {i}" for i in range(num_classes)]
    figure = draw_confusion(torch.eye(num_classes), names)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axis = figure.axes[0]
    assert not overlapping(axis.get_xticklabels(), canvas.get_renderer())
    assert not overlapping(axis.get_yticklabels(), canvas.get_renderer())
    assert bool(axis.texts) == (num_classes <= 30)


def test_bars_go_from_best_to_worst_and_say_what_is_absent():
    scores = {"sky": 0.5, "road": math.nan, "car": 0.915, "tree": 0.0}
    (axis,) = draw_class_scores(scores, 0.4717).axes
    assert labels_of(axis, "y") == ["car", "sky", "tree", "road"]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([91.5, 50, 0, 0])
    assert [text.get_text() for text in axis.texts] == ["91.5", "50.0", "0.0", "absent"]
    assert axis.lines[0].get_xdata()[0] == pytest.approx(47.17)
    assert "47.17" in axis.figure.get_suptitle()


def black(side):
    """Returns an image (3, side, side)."""
    return torch.zeros(3, side, side, dtype=torch.uint8)


def test_dollars_in_names_make_no_formula():
    names = ["co$t", "x_y$", r"$\foo$"]
    figures = [
        draw_class_scores(dict.fromkeys(names, 0.5), 0.5),
        draw_confusion(torch.eye(3), names),
        draw_panels([(black(4), *torch.zeros(2, 4, 4))], names, [[0, 0, 0]] * 3),
    ]
    for figure in figures:
        render(figure)  # or matplotlib would fail
    [legend] = figures[2].legends
    assert all(text._preprocess_math(text.get_text())[1] is False for text in legend.texts)
    ticks = figures[1].axes[0].get_yticklabels()
    assert [t._preprocess_math(t.get_text()) for t in ticks] == [(name, False) for name in names]


def test_an_underscore_hides_no_name():
    figure = draw_panels([(black(4), *torch.zeros(2, 4, 4))], ["_background_"], [[0] * 3])
    [text] = figure.legends[0].texts
    assert text.get_text() == "\u200b_background_"


def test_ignored_pixels_look_like_no_class():
    truth = torch.tensor([[0, 1], [2, 255]]).repeat_interleave(20, 0).repeat_interleave(20, 1)
    palette = [[0, 0, 0], [255, 255, 255], [128, 128, 128]]
    figure = draw_panels([(black(40), truth, truth)], ["a", "b", "c"], palette)
    shown = figure.axes[1].images[0].get_array()
    for rows, columns, colour in ((0, 0, 0), (0, 20, 255), (20, 0, 128)):
        assert np.unique(shown[rows : rows + 20, columns : columns + 20]).tolist() == [colour]
    assert np.unique(shown[20:, 20:]).tolist() == [150, 235]
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels == ["a", "b", "c", "ignored"]
    figure = draw_panels([(black(40), truth * 0, truth)], ["a", "b", "c"], palette)
    assert "ignored" not in [text.get_text() for text in figure.legends[0].texts]


def test_the_prediction_lies_over_the_image():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    prediction = torch.tensor([[1] * 4] * 4)
    figure = draw_panels([(image, prediction * 0, prediction)], ["a", "b"], [[0] * 3, [200, 0, 50]])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "truth", "prediction", "prediction over image"]
    assert (figure.axes[3].images[0].get_array() == [150, 50, 75]).all()


def test_many_bars_stand_in_columns():
    scores = {f"class number {i}": i / 150 for i in range(150)}
    figure = draw_class_scores(scores, 0.5)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [name for axis in figure.axes for name in labels_of(axis, "y")]
    assert shown == list(scores)[::-1]
    assert len(figure.axes) == 3
    for axis in figure.axes:
        assert not overlapping(axis.get_yticklabels(), canvas.get_renderer())


def test_scores_of_a_split_without_any_label_can_be_drawn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        render(draw_class_scores({"a": math.nan, "b": math.nan}, math.nan))
        pixels = render(draw_confusion(torch.zeros(2, 2), ["a", "b"]))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
