"""What holds for any size, window, crop and mask, tried on many."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from isanet_pl.data.dataset import code_table
from isanet_pl.data.files import map_codes, read_mask, read_top
from isanet_pl.data.transforms import TrainTransform
from isanet_pl.errors import InputError
from isanet_pl.losses import SegmentationLoss
from isanet_pl.metrics import SegmentationMetrics
from isanet_pl.models import ISAModule, ISANet
from isanet_pl.models.plain import plain_forward

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
CROPS = st.tuples(st.integers(1, 50), st.integers(1, 50))
WINDOWS = st.tuples(st.integers(1, 12), st.integers(1, 12))
MASKS = arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)))

# The folder of a test may serve all of its examples: each writes the same name anew.
in_a_folder = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=2),
    st.sampled_from(["long_short", "short_long", "long", "short"]),
    st.integers(0, 2**32 - 1),
)
def test_isa_is_its_published_formulation(size, windows, order, seed):
    torch.manual_seed(seed)
    module = ISAModule(3, 4, 5, 6, windows, order=order).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(module(x), plain_forward(module, x), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def networks():
    """Returns networks of random weights by form and window, made once."""
    made = {}

    def network(form, window):
        if (form, window) not in made:
            torch.manual_seed(0)
            width = {"key_channels": 4, "value_channels": 4, "out_channels": 4, "aux_channels": 4}
            made[form, window] = ISANet(
                3, "resnet18", last_stage=2, form=form, down_factors=[window], **width
            ).eval()
        return made[form, window]

    return network


@settings(max_examples=40)
@given(size=SIZES, form=st.sampled_from(["direct", "reduced"]), window=WINDOWS)
def test_logits_have_the_size_of_the_image(networks, size, form, window):
    network = networks(form, window)
    image = torch.randint(256, (1, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        out = network(network.normalise(image))["out"]
    assert out.shape == (1, 3, *size)
    assert out.isfinite().all()


@settings(max_examples=300)
@given(
    size=SIZES,
    crop=CROPS,
    low=st.floats(0.05, 3),
    more=st.floats(0, 3),
    ratio=st.sampled_from([0.3, 0.75, 1.0]),
    flip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_crop_shows_image_and_mask_at_the_same_places(size, crop, low, more, ratio, flip, seed):
    torch.manual_seed(seed)
    # Left half class 0, dark; right half class 1, bright: seen even after resizing.
    mask = (torch.arange(size[1]) >= size[1] // 2).to(torch.uint8).repeat(size[0], 1)
    image = (200 * mask)[..., None].repeat(1, 1, 3).permute(2, 0, 1)  # lies as files are decoded
    transform = TrainTransform(crop, (low, low + more), cat_max_ratio=ratio, flip=flip)
    seen, labels = transform(image, mask)
    assert seen.shape == (3, *crop)
    assert labels.shape == crop
    assert seen.dtype == labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) <= {0, 1, 255}
    assert (labels != 255).any()
    # Resized, an edge is blurred by at most a pixel of the coarser of the two images.
    blur = 2 + round(low + more)
    for row, line in zip(labels.tolist(), seen[0].tolist(), strict=True):
        for column in range(blur, len(row) - blur):
            if len({row[column], *row[column - blur : column + blur + 1]} - {255}) == 1:
                assert abs(line[column] - 200 * row[column]) <= 1 or row[column] == 255


LABEL_MAPS = st.dictionaries(st.integers(0, 255), st.sampled_from([0, 1, 2, 255]), max_size=12)


@given(MASKS, LABEL_MAPS)
def test_codes_become_their_classes_or_are_named(codes, label_map):
    table, known = code_table(3, label_map, False), {255: 255} | label_map
    unknown = sorted(set(codes.flatten().tolist()) - known.keys())
    if unknown:
        with pytest.raises(InputError, match=rf"a\.png holds the value {unknown[0]}\b"):
            map_codes(codes, table, 3, Path("a.png"))
    else:
        expected = [[known[code] for code in row] for row in codes.tolist()]
        assert map_codes(codes, table, 3, Path("a.png")).tolist() == expected


@in_a_folder
@given(codes=MASKS, ending=st.sampled_from(["png", "bmp", "tif"]), palette=st.booleans())
def test_a_mask_is_read_as_it_was_written(tmp_path, codes, ending, palette):
    image = Image.fromarray(codes)
    if palette:
        image.putpalette([*range(255, -1, -1)] * 3)
    image.save(tmp_path / f"a.{ending}")
    assert np.array_equal(read_mask(tmp_path / f"a.{ending}"), codes)


@in_a_folder
@given(size=SIZES, data=st.data())
def test_the_top_of_a_png_is_that_of_the_whole(tmp_path, size, data):
    rows = data.draw(st.integers(1, size[0]))
    pixels = np.random.default_rng(rows).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    top = read_top(tmp_path / "a.png", rows, size)
    assert np.array_equal(top.permute(1, 2, 0).numpy(), pixels[:rows])


@given(
    arrays.arrays(np.int64, (1, 5, 6), elements=st.sampled_from([0, 1, 2, 255])),
    st.sampled_from([None, 0.7]),
)
def test_ignored_pixels_have_no_gradient_and_the_loss_is_finite(mask, threshold):
    logits = torch.randn(1, 3, 5, 6, requires_grad=True)
    target = torch.from_numpy(mask)
    loss = SegmentationLoss(ohem_threshold=threshold)({"out": logits}, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad.movedim(1, -1)[target == 255] == 0).all()


@given(
    arrays.arrays(np.int64, (2, 4, 5), elements=st.integers(0, 2)),
    arrays.arrays(np.int64, (2, 4, 5), elements=st.sampled_from([0, 1, 2, 255])),
)
def test_scores_are_those_of_sets_of_pixels(prediction, target):
    metrics = SegmentationMetrics(3, ["a", "b", "c"])
    for one, other in zip(prediction, target, strict=True):  # in two updates, but of one count
        metrics.update(torch.from_numpy(one)[None], torch.from_numpy(other)[None])
    scores, counted, ious = metrics.compute(), target != 255, []
    for index, name in enumerate("abc"):
        mine, true = (prediction == index) & counted, target == index
        union = int((mine | true).sum())
        iou = float(scores[f"iou/{name}"])
        if union:
            ious.append(int((mine & true).sum()) / union)
            assert iou == pytest.approx(ious[-1])
        else:
            assert np.isnan(iou)
    assert float(scores["miou"]) == pytest.approx(np.mean(ious) if ious else np.nan, nan_ok=True)
