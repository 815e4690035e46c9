"""The made-up scenes: reproducible, and their classes told by the lamp alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from isanet_pl.data import Synthetic
from isanet_pl.data.synthetic import (
    BALL_INSET,
    BALL_RADIUS,
    BALL_SHIFT,
    CELL,
    LAMP_INSET,
    LAMP_RADIUS,
    SyntheticDataset,
)
from isanet_pl.errors import InputError
from isanet_pl.models import ISANet

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PALETTE = np.array(Synthetic.palette, dtype=np.uint8)
CORNERS = [(0, 0), (0, -1), (-1, 0), (-1, -1)]  # which cell: first or last row, column


class Dark(SyntheticDataset):
    """The same scenes with the lamp switched off."""

    def _draw_lamp(self, image, centre, colour):
        pass


def make(kind=SyntheticDataset, num_images=150, cells=3, palette=PALETTE, seed=(0, 0)):
    return kind(num_images, cells, palette, seed)


@pytest.fixture(scope="module")
def scenes():
    """150 scenes as (image (H, W, 3), mask (H, W)), integers."""
    return [as_arrays(sample) for sample in itertools.islice(make(), 150)]


def as_arrays(sample):
    return sample["image"].permute(1, 2, 0).numpy().astype(int), sample["mask"].numpy()


def in_cells(array):
    """Returns (rows of cells, columns of cells, CELL, CELL, ...)."""
    cells = len(array) // CELL
    return array.reshape(cells, CELL, cells, CELL, *array.shape[2:]).swapaxes(1, 2)


def find_lamp(image):
    """Returns the corner and the class of the lamp: where a lamp's colour is seen around white."""
    seen = {}
    size = len(image)
    for corner in CORNERS:
        row, column = (LAMP_INSET if i == 0 else size - LAMP_INSET for i in corner)
        colour = image[row - 1 : row + 1, column - 6 : column - 4].mean((0, 1))
        for index in range(1, len(PALETTE)):
            lamp = 0.88 * PALETTE[index] + 0.12 * 255  # five pixels from the centre
            seen[corner, index] = np.linalg.norm(colour - lamp)
    first, second = sorted(seen, key=seen.get)[:2]
    assert seen[first] < 12
    assert seen[second] > 24  # there is one lamp and no doubt about it
    return first


# Reproducible


def test_a_scene_depends_on_its_number_alone():
    forwards, mixed = make(num_images=8), make(num_images=8)
    expected = [forwards[i] for i in range(8)]
    for index in (5, 0, 5, 7, 3, 3):
        sample = mixed[index]
        assert torch.equal(sample["image"], expected[index]["image"])
        assert torch.equal(sample["mask"], expected[index]["mask"])
        assert sample["name"] == expected[index]["name"]
        # Neither the other random states nor writing into a sample change the next one.
        sample["image"].zero_()
        torch.manual_seed(index)
        np.random.seed(index)  # noqa: NPY002
    longer = make(num_images=100)
    assert torch.equal(longer[7]["image"], expected[7]["image"])


def test_no_two_scenes_are_the_same_in_any_split_or_seed():
    samples = [
        sample
        for seed in (0, 1)
        for split in ("train", "val", "test")
        for sample in itertools.islice(
            Synthetic(num_train=20, num_eval=20, seed=seed).build_dataset(split), 20
        )
    ]
    assert len(samples) == 120
    assert len({sample["image"].numpy().tobytes() for sample in samples}) == 120
    assert len({sample["mask"].numpy().tobytes() for sample in samples}) == 120
    assert len({sample["name"] for sample in samples}) == 120


@pytest.mark.parametrize("cells", [2, 3, 4])
def test_shapes_and_types(cells):
    for sample in itertools.islice(make(num_images=6, cells=cells), 6):
        assert sample["image"].shape == (3, CELL * cells, CELL * cells)
        assert sample["mask"].shape == (CELL * cells, CELL * cells)
        assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
        assert sample["image"].is_contiguous()
        image, mask = as_arrays(sample)
        corner, colour = find_lamp(image)
        assert set(np.unique(mask)) == {0, colour}
        assert not in_cells(mask)[corner].any()


def test_the_data_set_ends():
    dataset = make(num_images=3)
    # islice: a data set without an end would fill the memory.
    assert len(dataset) == len(list(itertools.islice(dataset, 5))) == 3
    for index in (3, 4, -1):
        with pytest.raises(IndexError):
            dataset[index]


# The task


def test_every_ball_is_named_after_the_lamp(scenes):
    for image, mask in scenes:
        _, colour = find_lamp(image)
        assert set(np.unique(mask)) == {0, colour}


def test_all_colours_and_all_corners_occur_together(scenes):
    found = {find_lamp(image) for image, _ in scenes}
    assert found == {(corner, colour) for corner in CORNERS for colour in (1, 2, 3, 4)}


def test_balls_are_round_and_sit_in_the_opposite_corner_of_cells_without_lamp(scenes):
    cells_used = set()
    least, most = BALL_RADIUS
    middle = np.arange(CELL) + 0.5
    for image, mask in scenes:
        corner, _ = find_lamp(image)
        balls = in_cells(mask > 0)
        assert not balls[corner].any()
        assert 3 <= balls.any((2, 3)).sum() <= 5
        for cell in zip(*balls.any((2, 3)).nonzero(), strict=True):
            ball = balls[cell]
            area = ball.sum()
            assert 0.95 * np.pi * least**2 < area < 1.05 * np.pi * most**2
            y = (middle * ball.sum(1)).sum() / area
            x = (middle * ball.sum(0)).sum() / area
            for centre, lamp in zip((y, x), corner, strict=True):
                place = CELL - BALL_INSET if lamp == 0 else BALL_INSET
                assert abs(centre - place) < BALL_SHIFT + 0.3
            distance = np.hypot(middle[:, None] - y, middle[None, :] - x)
            assert ball[distance < least - 1].all()
            assert not ball[distance > np.sqrt(area / np.pi) + 1.5].any()
            cells_used.add(tuple(map(int, cell)))
    assert len(cells_used) == 9


def test_nothing_but_the_lamp_tells_the_colour(scenes):
    # The same scenes with the lamps' colours exchanged: all other pixels stay as they are.
    other = make(palette=PALETTE[[0, 2, 3, 4, 1]])
    for index, (image, mask) in enumerate(scenes):
        exchanged, same_mask = as_arrays(other[index])
        corner, _ = find_lamp(image)
        assert np.array_equal(same_mask, mask)
        changed = in_cells((exchanged != image).any(-1))
        assert changed[corner].any()
        changed[corner] = False
        assert not changed.any()
        balls = image[mask > 0]
        assert np.array_equal(balls.min(-1), balls.max(-1))  # grey


def lit(index, image):
    """Returns where the lamp shows in a scene, (H, W): more than the grain of the background."""
    dark, _ = as_arrays(make(Dark)[index])
    return abs(image - dark).max(-1) > 8


def test_the_lamp_hugs_its_corner(scenes):
    for index, (image, _) in enumerate(scenes):
        corner, _ = find_lamp(image)
        shown = in_cells(lit(index, image))
        assert shown[corner].sum() > 2 * LAMP_RADIUS**2
        # No more than half a cell from the corner, in either direction.
        inner = [slice(CELL // 2, None) if i == 0 else slice(None, CELL // 2) for i in corner]
        assert not shown[corner][inner[0]].any()
        assert not shown[corner][:, inner[1]].any()
        shown[corner] = False
        assert not shown.any()


@pytest.mark.parametrize("cells", [2, 3])
@pytest.mark.parametrize(
    ("options", "reached"),
    [
        pytest.param({}, True, id="isa"),
        pytest.param({"context": "dense"}, True, id="dense"),
        pytest.param({"order": "long"}, False, id="long alone"),
        pytest.param({"order": "short"}, False, id="short alone"),
        pytest.param({"context": "none"}, False, id="none"),
    ],
)
def test_only_both_stages_together_lead_from_the_lamp_to_a_ball(options, reached, cells):
    # Whatever it has learnt: with another colour of the lamp, the logits at balls change or do not.
    config = yaml.safe_load(QUICKSTART.read_text())["model"]["network"]
    torch.manual_seed(0)
    network = ISANet(len(PALETTE), **{**config, **options}).double().eval()
    scenes = make(cells=cells), make(cells=cells, palette=PALETTE[[0, 2, 3, 4, 1]])
    for index in range(5):
        one, other = (kind[index] for kind in scenes)
        assert not torch.equal(one["image"], other["image"])
        with torch.inference_mode():
            logits = [network(scene["image"][None].double())["out"][0] for scene in (one, other)]
        changed = (logits[0] - logits[1]).abs().amax(0) > 0
        assert changed[one["mask"] > 0].all() if reached else not changed[one["mask"] > 0].any()


# As a data module


def test_loaders():
    data = Synthetic(num_train=5, num_eval=3, cells=2, batch_size=2, num_workers=0)
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == len(data.palette) == 5
    batches = list(data.train_dataloader())
    assert [batch["image"].shape for batch in batches] == [(2, 3, 2 * CELL, 2 * CELL)] * 2
    assert [batch["mask"].shape for batch in batches] == [(2, 2 * CELL, 2 * CELL)] * 2
    assert len(list(data.val_dataloader())) == len(list(data.test_dataloader())) == 3


@pytest.mark.parametrize(
    "arguments", [{"cells": 1}, {"cells": 0}, {"num_train": 0}, {"num_eval": 0}, {"num_train": -1}]
)
def test_wrong_arguments(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(InputError, match=f"cells >= 2.*{name} {value}"):
        Synthetic(**arguments)


def test_train_on_val_is_refused_as_scenes_cost_nothing():
    with pytest.raises(InputError, match=r"--data\.num_train"):
        Synthetic(train_on_val=True)


def test_fewer_scenes_than_a_batch():
    with pytest.raises(InputError, match=r"3 images.*--data\.batch_size 3"):
        Synthetic(num_train=3, batch_size=4).setup("fit")
