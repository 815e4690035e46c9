"""Small data sets on disk, the same ones on every run."""

import gc
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from isanet_pl.errors import InputError

# What Lightning would see of a cluster, and rich of a terminal, where the suite runs. Before the
# tests import Lightning: it asks then which process of how many this is.
ELSEWHERE = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("FORCE_COLOR", "TTY_COMPATIBLE"),
)
# And of a repository, where they run in one of its hooks.
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "GIT_")) or _name in ELSEWHERE:
        del os.environ[_name]

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_finish():
    """Leaves all that was imported out of garbage collection.

    Every validation asks for one, because of its figures, and it would take a third of a second.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Lets it all be collected at the end, or C++ modules complain of leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _messages_go_to_the_stream_of_this_test():
    """Takes away the handler of messages, which would write to the next test's closed stderr."""
    logging.getLogger("isanet_pl").handlers.clear()


@pytest.fixture(autouse=True)
def _random_numbers_are_those_of_this_test():
    """Gives every test the same numbers of torch, whatever ran before it."""
    torch.manual_seed(0)


CAMVID_COLOURS = [(40 * code % 256, 90 * code % 256, 150 * code % 256) for code in range(12)]


def make_scene(index, size, codes):
    """Returns an RGB image (H, W, 3) and a mask (H, W): upright stripes, one for each code.

    Every code has its own brightness, so that the mask can be told from the image; `index` moves
    the stripes, so that no two scenes are the same.
    """
    height, width = size
    rng = np.random.default_rng(index)
    stripes = (np.arange(width) * len(codes) // width + index) % len(codes)
    mask = np.broadcast_to(np.array(codes, dtype=np.uint8)[stripes], size).copy()
    grey = 30 + 200 * stripes // len(codes)
    image = grey[None, :, None] + rng.integers(0, 20, size=(height, width, 3))
    return image.astype(np.uint8), mask


def make_folder(root, splits=("train", "val", "test"), size=(24, 32), num_classes=3, count=3):
    """Writes `count` scenes for each split as SegmentationFolder wants them; returns the folder.

    Masks hold the classes and 255. Scene i of any split is `make_scene(i, size, codes)`. Class
    names are not written.
    """
    for split in splits:
        images, masks = root / split / "images", root / split / "masks"
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for index in range(count):
            image, mask = make_scene(index, size, [*range(num_classes), 255])
            Image.fromarray(image).save(images / f"scene{index}.png")
            Image.fromarray(mask).save(masks / f"scene{index}.png")
    return root


def make_camvid(root, size=(24, 36), count=2):
    """Writes scenes as CamVid comes: JPEG images, palette masks with void as 11."""
    for split in ("train", "val", "test"):
        images, labels = root / split / "images", root / split / "labels"
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            image, mask = make_scene(index, size, range(12))
            Image.fromarray(image).save(images / f"frame{index}.jpg", quality=95)
            label = Image.fromarray(mask)
            label.putpalette([part for colour in CAMVID_COLOURS for part in colour])
            label.save(labels / f"frame{index}.png")
    return root


def truncate(path, share=0.5):
    """Takes the end off a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def fails_naming(*words):
    """Returns the expectation of an InputError that says all of the words, in this order."""
    return pytest.raises(InputError, match="(?s)" + ".*".join(re.escape(str(w)) for w in words))


@pytest.fixture
def scripts_on_path(monkeypatch):
    """Lets a test import what the scripts import from each other."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))


@pytest.fixture
def folder(tmp_path):
    """A SegmentationFolder of 3 classes, 3 scenes a split."""
    return make_folder(tmp_path / "folder")


@pytest.fixture
def small_camvid(tmp_path):
    """A folder laid out like CamVid, 2 scenes a split."""
    return make_camvid(tmp_path / "camvid")


@pytest.fixture(scope="session")
def camvid_root():
    """The real CamVid below the folder that ISANET_TEST_DATA names; skips without it."""
    name = os.environ.get("ISANET_TEST_DATA")
    if not name:
        pytest.skip("ISANET_TEST_DATA is not set")
    path = Path(name) / "data" / "camvid"
    if not path.is_dir():
        pytest.skip(f"ISANET_TEST_DATA has no {path}")
    return path
