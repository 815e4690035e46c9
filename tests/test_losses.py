"""The loss against PyTorch's own and against an independent OHEM in numpy."""

import numpy as np
import pytest
import torch

from isanet_pl.losses import SegmentationLoss

WEIGHTS = [0.5, 2.0, 1.0, 3.0]


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 2 * torch.randn(2, 4, 6, 5)


@pytest.fixture
def target():
    torch.manual_seed(1)
    target = torch.randint(4, (2, 6, 5))
    target[0, :2] = 255
    return target


def hard_pixels(logits, target, threshold, min_kept):
    """Returns a bool map: the OHEM choice by sorting, in double precision."""
    exps = np.exp(logits.double().numpy())
    probabilities = np.moveaxis(exps / exps.sum(axis=1, keepdims=True), 1, -1).reshape(-1, 4)
    labels = target.numpy().ravel()
    valid = np.flatnonzero(labels != 255)
    of_true_class = probabilities[valid, labels[valid]]
    hardest_first = np.argsort(of_true_class)
    keep = np.zeros(labels.shape, dtype=bool)
    keep[valid[hardest_first[:min_kept]]] = True
    keep[valid[of_true_class <= threshold]] = True
    return keep.reshape(target.shape)


def reference_loss(logits, target, weights=None):
    weights = None if weights is None else torch.tensor(weights)
    return torch.nn.CrossEntropyLoss(weights, ignore_index=255)(logits, target)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_equals_cross_entropy(logits, target, weights, dtype):
    loss = SegmentationLoss(weights)({"out": logits}, target.to(dtype))
    torch.testing.assert_close(loss, reference_loss(logits, target, weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_gradient_equals_cross_entropy(logits, target, weights):
    logits.requires_grad_()
    ours = torch.autograd.grad(SegmentationLoss(weights)({"out": logits}, target), logits)
    theirs = torch.autograd.grad(reference_loss(logits, target, weights), logits)
    torch.testing.assert_close(ours, theirs)


def test_other_ignore_index(logits, target):
    target[target == 255] = 3
    expected = torch.nn.CrossEntropyLoss(ignore_index=3)(logits, target)
    loss = SegmentationLoss(ignore_index=3)({"out": logits}, target)
    torch.testing.assert_close(loss, expected)


def test_pixels_of_weight_zero_alone_train_nothing_in_16_mixed_either(logits, target):
    logits.requires_grad_()
    target = target.where(target == 255, 0)
    loss = SegmentationLoss([0.0, 1.0, 1.0, 1.0])({"out": logits}, target)
    (65536 * loss).backward()  # as a GradScaler does
    assert loss == 0
    assert not logits.grad.any()  # nor is one not finite


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    ("threshold", "min_kept", "num_kept"),  # of 50 pixels that are not ignored
    [
        (0.7, 5, 46),  # the threshold decides
        (0.2, 5, 28),
        (0.2, 40, 40),  # min_kept decides
        (1e-6, 1, 1),
        (0.7, 100_000, 50),  # all of them
        (1.0, 1, 50),
    ],
)
def test_ohem_equals_numpy(logits, target, threshold, min_kept, num_kept, weights):
    keep = hard_pixels(logits, target, threshold, min_kept)
    assert keep.sum() == num_kept
    expected = reference_loss(logits, target.where(torch.from_numpy(keep), 255), weights)
    loss = SegmentationLoss(weights, ohem_threshold=threshold, ohem_min_kept=min_kept)
    torch.testing.assert_close(loss({"out": logits}, target), expected)


@pytest.mark.parametrize("min_kept", [1, 30, 50, 1000])
def test_ohem_trains_exactly_the_hard_pixels(logits, target, min_kept):
    logits.requires_grad_()
    SegmentationLoss(ohem_threshold=0.1, ohem_min_kept=min_kept)({"out": logits}, target).backward()
    trained = logits.grad.abs().sum(dim=1) > 0
    expected = hard_pixels(logits.detach(), target, 0.1, min_kept)
    assert trained.equal(torch.from_numpy(expected))
    assert trained.sum() >= min(min_kept, 50)


def test_ohem_keeps_enough_where_all_are_equally_easy(target):
    logits = torch.zeros(2, 4, 6, 5)
    logits.scatter_(1, target.clamp(max=3)[:, None], 9.0).requires_grad_()  # all pixels right
    SegmentationLoss(ohem_threshold=0.5, ohem_min_kept=9)({"out": logits}, target).backward()
    assert (logits.grad.abs().sum(dim=1) > 0).sum() >= 9


def test_auxiliary_loss_is_weighted(logits, target):
    aux = logits.flip(1)
    main, other = reference_loss(logits, target), reference_loss(aux, target)
    outputs = {"out": logits, "aux": aux}
    torch.testing.assert_close(SegmentationLoss()(outputs, target), main + 0.4 * other)
    loss = SegmentationLoss(aux_weight=1.5)(outputs, target)
    torch.testing.assert_close(loss, main + 1.5 * other)


def test_a_negative_weight_of_the_auxiliary_head_is_refused():
    with pytest.raises(ValueError, match="aux_weight must be a number of at least 0, got -1"):
        SegmentationLoss(aux_weight=-1)


def test_ohem_that_keeps_all_pixels_says_so_once(logits, target, caplog):
    loss = SegmentationLoss(ohem_threshold=0.7)
    for _ in range(2):
        loss({"out": logits}, target)
    [record] = caplog.records
    assert "ohem_min_kept is 100000, and a batch on a device has 60" in record.getMessage()
    caplog.clear()
    SegmentationLoss(ohem_threshold=0.7, ohem_min_kept=59)({"out": logits}, target)
    assert not caplog.records


def test_auxiliary_head_counts_all_pixels(logits, target):
    aux = logits.flip(1)
    loss = SegmentationLoss(ohem_threshold=0.3, ohem_min_kept=3)
    mined, plain = loss({"out": logits}, target), SegmentationLoss()({"out": aux}, target)
    assert mined > 1.01 * SegmentationLoss()({"out": logits}, target)
    torch.testing.assert_close(loss({"out": logits, "aux": aux}, target), mined + 0.4 * plain)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_all_ignored_gives_zero_loss_and_zero_gradient(logits, weights, threshold):
    aux = logits.clone().requires_grad_()
    logits.requires_grad_()
    target = torch.full((2, 6, 5), 255)
    loss = SegmentationLoss(weights, ohem_threshold=threshold)({"out": logits, "aux": aux}, target)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()  # False for NaN
    assert (aux.grad == 0).all()


def test_classes_of_weight_zero_do_not_count(logits, target):
    rest = target.where(target != 2, 255)
    loss = SegmentationLoss([1, 1, 0, 1])({"out": logits}, target)
    torch.testing.assert_close(loss, reference_loss(logits, rest))
    # Where nothing else is in the batch the loss is 0, not the 0 / 0 of CrossEntropyLoss.
    assert SegmentationLoss([1, 1, 0, 1])({"out": logits}, torch.full((2, 6, 5), 2)) == 0


def test_bfloat16_logits_are_summed_in_fp32(logits, target):
    logits = logits.bfloat16().requires_grad_()
    for weights in (None, WEIGHTS):
        loss = SegmentationLoss(weights)({"out": logits}, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, reference_loss(logits.float(), target, weights))
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()


def test_loss_stays_fp32_under_autocast(logits, target):
    with torch.autocast("cpu", torch.bfloat16):
        loss = SegmentationLoss(WEIGHTS)({"out": logits}, target)
    torch.testing.assert_close(loss, reference_loss(logits, target, WEIGHTS))


def test_class_weights_are_not_part_of_a_checkpoint():
    assert not SegmentationLoss(WEIGHTS).state_dict()


def test_wrong_number_of_class_weights_is_refused(logits, target):
    with pytest.raises(ValueError, match="class_weights has 3 entries for 4 classes"):
        SegmentationLoss([1.0, 2.0, 3.0])({"out": logits}, target)


def test_negative_class_weight_is_refused():
    with pytest.raises(ValueError, match=r"class_weights must be numbers >= 0.*-2"):
        SegmentationLoss([1.0, -2.0])


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5])
def test_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"ohem_threshold.*{threshold}"):
        SegmentationLoss(ohem_threshold=threshold)
