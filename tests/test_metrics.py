"""The metric by hand, against numpy, and on bad input."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from isanet_pl.metrics import SegmentationMetrics


def as_map(*values):
    return torch.tensor(values).view(1, 1, -1)


def numpy_scores(prediction, target, num_classes, ignore_index=255):
    """Returns miou, macc, aacc and the IoU of each class by counting pixels class by class."""
    valid = target != ignore_index
    prediction, target = prediction[valid], target[valid]
    ious, recalls = [], []
    for k in range(num_classes):
        both = np.sum((prediction == k) & (target == k))
        either = np.sum((prediction == k) | (target == k))
        ious.append(both / either if either else math.nan)
        if np.any(target == k):
            recalls.append(both / np.sum(target == k))
    present = [iou for iou in ious if not math.isnan(iou)]
    return np.mean(present), np.mean(recalls), np.mean(prediction == target), ious


def assert_scores(scores, expected, names):
    miou, macc, aacc, ious = expected
    wanted = {"miou": miou, "macc": macc, "aacc": aacc}
    wanted.update({f"iou/{name}": iou for name, iou in zip(names, ious, strict=True)})
    assert list(scores) == list(wanted)
    for name, value in wanted.items():
        assert scores[name].item() == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_by_hand():
    metrics = SegmentationMetrics(4, ["sky", "road", "car", "tree"])
    metrics.update(as_map(0, 0, 1, 0, 3), as_map(0, 0, 1, 1, 255))
    # sky:  2 right, 1 predicted wrongly, 0 missed: IoU 2/3, recall 2/2
    # road: 1 right, 0 predicted wrongly, 1 missed: IoU 1/2, recall 1/2
    # car:  nowhere; tree: predicted only where the label is ignored, so nowhere either
    # mIoU (2/3 + 1/2) / 2 = 7/12 = 0.583333, mAcc (1 + 1/2) / 2, 3 of 4 pixels right
    expected = (0.583333, 3 / 4, 3 / 4, [2 / 3, 1 / 2, math.nan, math.nan])
    assert_scores(metrics.compute(), expected, ["sky", "road", "car", "tree"])


def test_deterministic_algorithms_count_the_same():
    prediction = torch.randint(0, 5, (2, 30, 40))
    target = torch.randint(0, 6, (2, 30, 40))
    target[target == 5] = 255
    found = []
    for deterministic in (False, True):
        metrics = SegmentationMetrics(5)
        torch.use_deterministic_algorithms(deterministic)
        try:
            metrics.update(prediction, target)
        finally:
            torch.use_deterministic_algorithms(False)
        found.append(metrics.confmat)
    expected = MulticlassConfusionMatrix(5, ignore_index=255)(prediction, target)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def test_confusion_matrix_of_the_last_compute_outlives_reset():
    metrics = SegmentationMetrics(3)
    metrics.update(as_map(0, 0, 1, 2), as_map(0, 1, 1, 255))
    metrics.compute()
    metrics.update(as_map(2), as_map(2))  # not computed
    metrics.reset()
    assert metrics.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_predicted_but_never_labelled_counts_as_zero():
    metrics = SegmentationMetrics(3)
    metrics.update(as_map(0, 0, 2, 2), as_map(0, 0, 0, 0))
    # Class 2 is not absent: IoU 0 of its 2 pixels. It has no recall, as no label is 2.
    assert_scores(metrics.compute(), (1 / 4, 1 / 2, 1 / 2, [1 / 2, math.nan, 0]), "012")


@pytest.mark.parametrize("ignore_index", [255, 7])
def test_equals_numpy_over_several_batches(ignore_index):
    generator = np.random.default_rng(0)
    target = generator.choice([0, 1, 3, 4, ignore_index], size=(6, 9, 11))
    prediction = np.where(
        generator.random(target.shape) < 0.6, target, generator.integers(0, 5, target.shape)
    )
    prediction[target == ignore_index] = 5
    prediction[prediction == 2] = 0  # 2 is absent; 5 is predicted, but only where it is ignored
    prediction[0, 0, 0], target[0, 0, 0] = 6, 0  # 6 is predicted, never a label
    names = list("abcdefg")
    metrics = SegmentationMetrics(7, names, ignore_index)
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        metrics.update(
            torch.from_numpy(prediction[start:stop]), torch.from_numpy(target[start:stop])
        )
    expected = numpy_scores(prediction, target, 7, ignore_index)
    assert np.isnan(expected[3]).tolist() == [False, False, True, False, False, True, False]
    assert_scores(metrics.compute(), expected, names)


def test_is_not_the_mean_over_images():
    metrics = SegmentationMetrics(2)
    metrics.update(as_map(0, 0, 0, 0), as_map(0, 0, 0, 0))
    metrics.update(as_map(0, 0, 0, 1), as_map(1, 1, 1, 1))
    # One matrix: class 0 has 4 right of 4 + 3, class 1 has 1 right of 4. By image it would be
    # (1 + 1/8) / 2.
    assert_scores(metrics.compute(), ((4 / 7 + 1 / 4) / 2, 5 / 8, 5 / 8, [4 / 7, 1 / 4]), "01")


def test_all_ignored_is_nan():
    metrics = SegmentationMetrics(3)
    metrics.update(as_map(0, 1, 2), as_map(255, 255, 255))
    scores = metrics.compute()
    assert len(scores) == 6
    assert all(score.isnan() for score in scores.values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_many_classes_in_small_integers(dtype):
    # 171 * 170 + 170 does not fit into a uint8.
    generator = np.random.default_rng(0)
    target = generator.integers(0, 171, (2, 40, 50))
    prediction = np.where(generator.random(target.shape) < 0.5, target, (target + 7) % 171)
    target[0, :5] = 255
    metrics = SegmentationMetrics(171)
    metrics.update(torch.from_numpy(prediction).to(dtype), torch.from_numpy(target).to(dtype))
    expected = numpy_scores(prediction, target, 171)
    assert_scores(metrics.compute(), expected, [str(k) for k in range(171)])


def test_reset_forgets():
    metrics = SegmentationMetrics(2)
    metrics.update(as_map(0, 1, 1), as_map(1, 0, 1))
    metrics.reset()
    metrics.update(as_map(0, 1), as_map(0, 1))
    assert_scores(metrics.compute(), (1, 1, 1, [1, 1]), "01")


def test_wrong_number_of_names_is_refused():
    with pytest.raises(ValueError, match="3 classes need as many different names"):
        SegmentationMetrics(3, ["sky", "road"])


def test_shapes_that_differ_are_refused():
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match=r"prediction \(1, 4, 4\) and target \(1, 4, 5\) differ"):
        metrics.update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long())


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ((0, 3), (0, 1), "prediction holds 3, outside 0..2"),
        ((0, -1), (0, 1), "prediction holds -1, outside 0..2"),
        ((0, 1), (0, 3), "target holds 3, outside 0..2"),
        ((0, 1), (254, 255), "target holds 254, outside 0..2"),
        ((0, 1), (0, -1), "target holds -1, outside 0..2"),
        ((255, 1), (255, 1), "prediction holds 255, outside 0..2"),
    ],
)
def test_values_outside_the_classes_are_refused(prediction, target, message):
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match=message):
        metrics.update(as_map(*prediction), as_map(*target))
    assert metrics.confmat.sum() == 0  # nothing of the batch was counted
