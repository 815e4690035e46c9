"""Photometric distortion: what each change does, and how often."""

import colorsys

import pytest
import torch

from isanet_pl.data.colours import Jitter, distort, draw_jitter


def noise(height=9, width=11):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


def close(found, expected, atol=1):
    """The result is rounded to whole values."""
    difference = (found.float() - expected).abs().max()
    return float(difference) <= 0.51 * atol


def test_the_default_changes_nothing():
    image = noise()
    assert torch.equal(distort(image, Jitter()), image)


def test_brightness_is_added_and_contrast_multiplied():
    image = noise()
    bright = distort(image, Jitter(brightness=-20.4))
    assert bright.dtype == torch.uint8
    assert close(bright, (image.float() - 20.4).clamp(0, 255))
    for last in (False, True):
        strong = distort(image, Jitter(contrast=1.4, contrast_last=last))
        assert close(strong, (image.float() * 1.4).clamp(0, 255))


def hsv(pixel):
    return colorsys.rgb_to_hsv(*(value / 255 for value in pixel))


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.5])
def test_saturation_scales_s_of_hsv_alone(factor):
    image = noise()
    found = distort(image, Jitter(saturation=factor))
    for before, after in zip(image.flatten(1).T.tolist(), found.flatten(1).T, strict=True):
        h, s, v = hsv(before)
        expected = colorsys.hsv_to_rgb(h, min(1, s * factor), v)
        assert close(after, 255 * torch.tensor(expected))


@pytest.mark.parametrize("turn", [-0.1, 0.07])
def test_hue_moves_h_of_hsv_alone(turn):
    image = noise()
    found = distort(image, Jitter(hue=turn))
    for before, after in zip(image.flatten(1).T.tolist(), found.flatten(1).T, strict=True):
        h, s, v = hsv(before)
        expected = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
        assert close(after, 255 * torch.tensor(expected), atol=2)


def test_grey_stays_grey_and_black_and_white_are_safe():
    image = torch.tensor([0, 1, 128, 255], dtype=torch.uint8).expand(3, 1, 4)
    found = distort(image, Jitter(saturation=1.5, hue=0.1))
    assert torch.equal(found, image)


def test_contrast_before_or_after_the_other_changes():
    # Red saturates at 255 under contrast: saturation then works on another colour.
    image = torch.tensor([200, 60, 60], dtype=torch.uint8).view(3, 1, 1)
    first = distort(image, Jitter(contrast=1.5, saturation=0.5))
    last = distort(image, Jitter(contrast=1.5, saturation=0.5, contrast_last=True))
    assert first.flatten().tolist() == [255, 172, 172]  # 255, 90, 90, then half way to 255
    assert last.flatten().tolist() == [255, 195, 195]  # 200, 130, 130, then times 1.5


def test_input_and_layout_are_left_alone():
    image = torch.randint(256, (9, 11, 3), dtype=torch.uint8).permute(2, 0, 1)
    before = image.clone()
    distort(image, Jitter(10, 1.2, True, 0.7, 0.05))
    assert torch.equal(image, before)


def test_draws_stay_in_the_ranges_and_leave_half_of_the_changes_out():
    draws = [draw_jitter() for _ in range(4000)]
    for field, neutral, reach in (
        ("brightness", 0, 32),
        ("contrast", 1, 0.5),
        ("saturation", 1, 0.5),
        ("hue", 0, 0.1),
    ):
        offsets = torch.tensor([getattr(draw, field) - neutral for draw in draws])
        used = offsets[offsets != 0]
        assert 0.46 < len(used) / len(draws) < 0.54
        assert used.abs().max() <= reach * (1 + 1e-6)
        quantiles = used.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
        expected = torch.tensor([-0.9, -0.5, 0, 0.5, 0.9]) * reach
        assert torch.allclose(quantiles, expected, atol=0.07 * reach)
    assert 0.46 < sum(draw.contrast_last for draw in draws) / len(draws) < 0.54


def test_changes_are_drawn_independently():
    used = torch.tensor(
        [
            [d.brightness != 0, d.contrast != 1, d.saturation != 1, d.hue != 0]
            for d in (draw_jitter() for _ in range(4000))
        ]
    ).float()
    correlation = torch.corrcoef(used.T) - torch.eye(4)
    assert correlation.abs().max() < 0.07
