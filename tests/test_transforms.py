"""Training transforms: one window for image and mask, distributed as resize-then-crop."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from isanet_pl.data.transforms import TrainTransform
from isanet_pl.inference import _resize, fit_scale

MEAN_COLOUR = torch.tensor([0.485, 0.456, 0.406]).mul(255).round().to(torch.uint8)  # ImageNet


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a loader's worker; more threads only wait for each other on images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ramps(height, width):
    """Returns an image whose red is its row and whose green is its column, and both as masks."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    image = torch.stack([rows, columns, torch.full_like(rows, 7)])
    return image, rows.contiguous(), columns.contiguous()


def random_pair(height, width, num_classes=5):
    """Returns noise, in the memory layout that read_image gives."""
    image = torch.randint(256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    return image, torch.randint(num_classes, (height, width), dtype=torch.uint8)


def plain(crop_size, scale_range, flip=False):
    return TrainTransform(crop_size, scale_range, flip=flip)


def same_draw(transform, number, *pairs):
    """Returns what the transform makes of each pair with the same random numbers."""
    results = []
    for pair in pairs:
        torch.manual_seed(number)
        results.append(transform(*pair))
    return results


# Size and padding


SIZES = [(1, 1), (1, 37), (37, 1), (20, 30), (64, 64), (101, 70)]
CROPS = [(1, 1), (2, 9), (32, 32), (48, 24), (65, 129)]


@pytest.mark.parametrize(("size", "crop"), list(itertools.product(SIZES, CROPS)))
def test_result_has_the_crop_size_and_is_padded_right_and_below(size, crop):
    for scale in (0.01, 0.3, 0.5, 1.0, 1.37, 2.0, 5.0):
        image, mask = random_pair(*size)
        cut, cut_mask = TrainTransform(crop, (scale, scale))(image, mask)
        assert cut.dtype == cut_mask.dtype == torch.uint8
        assert cut.shape == (3, *crop)
        assert cut_mask.shape == crop
        height, width = (min(c, max(1, round(s * scale))) for c, s in zip(crop, size, strict=True))
        padded = torch.ones(crop, dtype=torch.bool)
        padded[:height, :width] = False
        assert torch.equal(cut_mask == 255, padded)  # the masks themselves hold no 255
        assert (cut[:, padded] == MEAN_COLOUR[:, None]).all()


def test_a_mirrored_crop_is_padded_right_and_below():
    image, mask = random_pair(20, 30)
    crop = plain((32, 48), (1, 1), flip=True)
    mirrored = 0
    for _ in range(20):
        cut, cut_mask = crop(image, mask)
        assert (cut_mask[:20, :30] != 255).all()
        assert (cut_mask[20:] == 255).all()
        assert (cut_mask[:, 30:] == 255).all()
        mirrored += torch.equal(cut[:, :20, :30], image.flip(-1))
    assert 0 < mirrored < 20


def test_padding_does_not_bleed_into_the_image():
    image = torch.full((3, 40, 50), 200, dtype=torch.uint8)
    mask = torch.full((40, 50), 3, dtype=torch.uint8)
    for scale in (0.5, 0.77, 1.0, 1.3):
        cut, cut_mask = TrainTransform((64, 80), (scale, scale))(image, mask)
        assert set(cut[:, cut_mask == 3].unique().tolist()) == {200}
        assert set(cut_mask.unique().tolist()) == {3, 255}


def test_ignored_pixels_stay_ignored():
    image, mask = random_pair(30, 40)
    mask[:, 20:] = 255
    _, cut_mask = TrainTransform((15, 20), (0.5, 0.5))(image, mask)
    assert (cut_mask[:, :10] != 255).all()
    assert (cut_mask[:, 10:] == 255).all()


# Alignment of image and mask


def test_without_scaling_image_and_mask_show_the_very_same_pixels():
    image, rows, columns = ramps(60, 90)
    crop = plain((40, 70), (1, 1), flip=True)
    tops, lefts, mirrored = set(), set(), set()
    for number in range(300):
        (cut, row), (_, column) = same_draw(crop, number, (image, rows), (image, columns))
        assert torch.equal(cut[0], row)
        assert torch.equal(cut[1], column)
        tops.add(int(row[0, 0]))
        lefts.add(int(column.min()))
        mirrored.add(bool(column[0, 0] > column[0, 1]))
        assert torch.equal(row[:, 0].diff(), torch.ones(39, dtype=torch.uint8))  # never upside down
    assert mirrored == {False, True}
    assert tops == lefts == set(range(21))  # every place from one edge to the other occurs


def test_scaled_image_and_mask_show_the_same_places():
    image, rows, columns = ramps(120, 200)
    crop = plain((64, 80), (0.5, 2.0), flip=True)
    errors, mirrored = [], []
    for number in range(150):
        (cut, row), (_, column) = same_draw(crop, number, (image, rows), (image, columns))
        assert torch.equal(row == 255, column == 255)
        seen = row != 255
        # The image is interpolated, within half a level for each of the two axes; the mask takes
        # the nearest pixel, within half of one.
        for channel, mask in ((0, row), (1, column)):
            error = cut[channel][seen].float() - mask[seen].float()
            assert error.abs().max() <= 1.5
            errors.append(error.mean())
        mirrored.append(bool(column[0, 0] > column[0, 8]))
    # A mask one pixel off would show here, whichever way.
    assert abs(torch.stack(errors).mean()) < 0.05
    assert torch.stack(errors).abs().max() <= 0.6  # exactly 0.5 when the scale is 0.5
    assert 50 < sum(mirrored) < 100


def test_upscaling_by_two_repeats_mask_pixels_in_place():
    image, rows, columns = ramps(20, 30)
    crop = plain((40, 60), (2, 2))
    (cut, row), (_, column) = same_draw(crop, 0, (image, rows), (image, columns))
    assert torch.equal(row, rows.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(column, columns.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert (cut[0].float() - row.float()).abs().max() <= 1


@pytest.mark.parametrize("scale", [0.25, 0.37, 0.5, 0.75, 1.5])
def test_images_are_resized_as_in_evaluation(scale):
    image, mask = random_pair(48, 64)
    cut, cut_mask = plain((120, 140), (scale, scale))(image, mask)
    seen = _resize(image[None].float(), scale)[0]
    _, height, width = seen.shape
    assert (cut_mask[:height, :width] != 255).all()
    assert (cut[:, :height, :width].float() - seen).abs().max() < 1.01  # of 255


def test_shrinking_keeps_the_classes_of_the_mask():
    columns = torch.arange(64, dtype=torch.uint8)[None].expand(48, 64)
    mask = columns // 32 * 9  # left half 0, right half 9
    _, cut_mask = plain((12, 16), (0.25, 0.25))(columns.expand(3, 48, 64), mask)
    assert (cut_mask[:, :8] == 0).all()
    assert (cut_mask[:, 8:] == 9).all()


def test_inside_of_every_class_has_its_colour():
    # Blocks of 12 pixels; padding counts as one more class, of the mean colour.
    num_classes = 6
    mask = torch.randint(num_classes, (10, 14), dtype=torch.uint8)
    mask = mask.repeat_interleave(12, 0).repeat_interleave(12, 1)
    colours = torch.randint(256, (256, 3), dtype=torch.uint8)
    colours[255] = MEAN_COLOUR
    image = colours[mask.long()].permute(2, 0, 1).contiguous()
    transform = plain((96, 96), (0.5, 2.0), flip=True)
    checked = set()
    for _ in range(60):
        cut, cut_mask = transform(image, mask)
        wide = cut_mask[None].float()
        # Inside: all pixels within 2 have the same class, so interpolation sees no other one.
        least, most = (s * F.max_pool2d(s * wide, 5, 1, 2)[0] for s in (-1, 1))
        inside = least == most
        assert inside.float().mean() > 0.1
        difference = cut.float() - colours[cut_mask.long()].permute(2, 0, 1).float()
        assert difference[:, inside].abs().max() <= 1
        checked |= set(cut_mask[inside].unique().tolist())
    assert checked == {*range(num_classes), 255}


# Distribution


def test_scale_is_uniform_and_the_same_for_both_sides():
    image, mask = random_pair(50, 100)
    crop = TrainTransform((120, 220), (0.5, 2.0))
    scales = []
    for _ in range(2000):
        seen = crop(image, mask)[1] != 255
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        assert abs(height - width / 2) <= 1
        scales.append(width / 100)
    quantiles = torch.tensor(scales).quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(quantiles, torch.tensor([0.5, 0.875, 1.25, 1.625, 2.0]), atol=0.05)


def resize_then_crop(source, crop, scale):
    """Returns scale and centre of the window that a plain resize and random crop shows."""
    resized = max(1, round(source * scale))
    offset = int(torch.randint(max(resized - crop, 0) + 1, ()))
    shown = min(resized, crop)
    return resized / source, (offset + shown / 2) * source / resized


def cut_then_resize(source, crop, scale):
    """Returns the same two numbers of TrainTransform's window."""
    start, length, result = TrainTransform._axis(source, crop, scale)
    assert 0 <= start <= start + length <= source
    assert length >= 1
    assert 1 <= result <= crop
    return result / length, start + length / 2


@pytest.mark.parametrize(
    ("source", "crop"),
    [(480, 320), (360, 320), (1024, 769), (200, 320), (2048, 64), (40, 33)],
)
def test_windows_are_distributed_as_those_of_resize_then_crop(source, crop):
    scales = 0.5 + 1.5 * torch.rand(8000)
    probabilities = torch.linspace(0.05, 0.95, 19)
    found, expected = (
        torch.tensor([draw(source, crop, float(scale)) for scale in scales])
        for draw in (cut_then_resize, resize_then_crop)
    )
    # Windows start and end on whole source pixels: a few per cent of the scale, one pixel of the
    # centre. Beside that, 8000 draws know a quantile within 1.5 per cent of the range.
    assert torch.allclose(found[:, 0], expected[:, 0], rtol=0.02 + 0.6 / crop)
    centres = [x[:, 1].quantile(probabilities) for x in (found, expected)]
    assert torch.allclose(*centres, rtol=0, atol=0.5 + 0.015 * source)
    assert found[:, 1].mean() == pytest.approx(source / 2, abs=0.01 * source)
    assert found[:, 1].std() == pytest.approx(float(expected[:, 1].std()), rel=0.05, abs=0.5)


@pytest.mark.parametrize(("source", "crop"), [(1, 1), (1, 5), (2, 1), (3, 4), (7, 7), (9, 2)])
def test_windows_of_tiny_images_stay_inside(source, crop):
    for scale in torch.linspace(0.02, 6, 200):
        cut_then_resize(source, crop, float(scale))


def test_window_reaches_both_ends():
    starts = {TrainTransform._axis(12, 5, 1.0)[0] for _ in range(300)}
    assert starts == set(range(8))


# Base size


@pytest.mark.parametrize(
    ("size", "base_size", "factor"),
    [
        ((512, 683), (2048, 512), 1.0),  # the short edge decides
        ((300, 1500), (2048, 512), 2048 / 1500),  # the long one
        ((1500, 300), (2048, 512), 2048 / 1500),  # whichever way up
        ((1024, 2048), (2049, 1025), 2049 / 2048),
        ((100, 50), (25, 25), 0.25),
        ((100, 50), None, 1.0),
    ],
)
def test_base_size_is_fitted_to_both_edges(size, base_size, factor):
    assert fit_scale(size, base_size) == pytest.approx(factor)


def test_scale_range_is_relative_to_the_base_size():
    image, mask = random_pair(60, 120)
    _, cut = TrainTransform((200, 200), (0.5, 0.5), base_size=(240, 240))(image, mask)
    assert (cut != 255).any(1).sum() == 60  # twice its size, then half of that
    assert (cut != 255).any(0).sum() == 120
    _, cut = TrainTransform((200, 200), (1, 1), base_size=(30, 90))(image, mask)
    assert (cut != 255).any(1).sum() == 30  # the order of the two edges does not matter
    assert (cut != 255).any(0).sum() == 60


# Crops of one class


def spotted(height=64, width=256):
    """Returns an image of class 0 and, in its left eighth, rows of classes 1 and 2."""
    image, mask = random_pair(height, width)
    mask.zero_()
    mask[:, : width // 8] = (torch.arange(height)[:, None] // 4 % 2 + 1).to(torch.uint8)
    return image, mask


def varied_share(cat_max_ratio, ignored=False):
    image, mask = spotted()
    if ignored:
        mask[mask == 0] = 255
    crop = TrainTransform((32, 32), (1, 1), cat_max_ratio=cat_max_ratio)
    seen = 0
    for _ in range(400):
        counts = torch.bincount(crop(image, mask)[1].flatten().long(), minlength=256)[:255]
        seen += bool(counts.max() < 0.75 * counts.sum())
    return seen / 400


def test_crops_of_one_class_are_drawn_again():
    # One draw shows a varied crop with probability 24 / 225 (left edge 0..24 of 0..224, less where
    # class 0 is above three quarters); eleven draws nearly always end with one.
    assert varied_share(1.0) < 0.2
    assert varied_share(0.75) > 0.6


def test_crops_without_any_label_are_drawn_again():
    assert varied_share(1.0, ignored=True) < 0.25
    assert varied_share(0.75, ignored=True) > 0.7


def test_ignored_pixels_are_no_class_to_vary_with():
    transform = TrainTransform((8, 8), (1, 1), cat_max_ratio=0.75)
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:, 4:] = 255  # half of the window, but all that is labelled is one class
    assert not transform._is_varied(mask)
    mask[4:, :4] = 1
    assert transform._is_varied(mask)


def test_an_image_of_one_class_still_gives_a_crop():
    image, mask = random_pair(40, 40, num_classes=1)
    for value in (0, 255):
        _, cut = TrainTransform((16, 16), (1, 1), cat_max_ratio=0.75)(image, mask + value)
        assert (cut == value).all()


# Off, reproducible, wrong arguments


def test_nothing_changes_when_all_is_off():
    image, mask = random_pair(33, 47)
    mask[5:9] = 255
    cut, cut_mask = plain((33, 47), (1, 1))(image, mask)
    assert torch.equal(cut, image)
    assert torch.equal(cut_mask, mask)


def test_flip_alone_mirrors_half_of_the_pairs():
    image, mask = random_pair(9, 11)
    mirrored = 0
    for _ in range(200):
        cut, cut_mask = plain((9, 11), (1, 1), flip=True)(image, mask)
        flipped = not torch.equal(cut, image)
        assert torch.equal(cut, image.flip(-1) if flipped else image)
        assert torch.equal(cut_mask, mask.flip(-1) if flipped else mask)
        mirrored += flipped
    assert 70 <= mirrored <= 130


def test_flip_exchanges_left_and_right_classes():
    image, mask = random_pair(9, 11)
    mask[0] = 255
    exchanged = torch.tensor([0, 2, 1, 3, 4])[mask.where(mask != 255, 0).long()].to(torch.uint8)
    exchanged[0] = 255
    transform = TrainTransform((9, 11), (1, 1), flip=True, mirrored_classes=[(1, 2)])
    seen = set()
    for _ in range(40):
        cut, cut_mask = transform(image, mask)
        flipped = torch.equal(cut, image.flip(-1))
        assert torch.equal(cut_mask, exchanged.flip(-1) if flipped else mask)
        seen.add(flipped)
    assert seen == {False, True}


def test_inputs_are_left_alone():
    image, mask = random_pair(20, 30)
    image_before, mask_before = image.clone(), mask.clone()
    for crop, scale_range in itertools.product([(20, 30), (8, 8), (40, 40)], [(1, 1), (0.5, 2.0)]):
        for _ in range(5):
            TrainTransform(crop, scale_range, flip=True, mirrored_classes=[(0, 1)])(image, mask)
    assert torch.equal(image, image_before)
    assert torch.equal(mask, mask_before)


def test_the_seed_decides_everything():
    pair = random_pair(50, 60)
    transform = plain((32, 32), (0.5, 2.0), flip=True)
    first, second, other = (same_draw(transform, number, pair)[0] for number in (3, 3, 4))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("crop_size", [(0, 8), (8, 0), (-1, 8)])
def test_crop_size_must_be_positive(crop_size):
    with pytest.raises(ValueError, match=r"crop_size.*positive.*got \("):
        TrainTransform(crop_size, (1, 1))


@pytest.mark.parametrize("scale_range", [(0, 1), (-1, 1), (2, 1), (float("nan"), 1)])
def test_scale_range_must_be_positive_and_in_order(scale_range):
    with pytest.raises(ValueError, match=r"scale_range.*low <= high.*got \("):
        TrainTransform((8, 8), scale_range)


@pytest.mark.parametrize(
    ("argument", "value"), [("base_size", (0, 8)), ("cat_max_ratio", 0), ("cat_max_ratio", 1.1)]
)
def test_other_arguments_must_make_sense(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be .*got .*{value}"):
        TrainTransform((8, 8), (1, 1), **{argument: value})
