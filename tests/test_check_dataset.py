"""The data check: facts, fingerprint, verdict, and the script around them."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import layouts
import numpy as np
import pytest
from conftest import make_camvid, make_scene, truncate
from PIL import Image
from rich.console import Console

import isanet_pl.data
from isanet_pl.check.contact_sheet import draw_classes, draw_contact_sheet, read_thumbnail
from isanet_pl.check.facts import (
    CODES_KEPT,
    FILES_KEPT,
    Files,
    Outside,
    SplitFacts,
    read_pairs,
)
from isanet_pl.check.fingerprint import find_duplicates, summarise
from isanet_pl.check.scan import scan
from isanet_pl.check.verdict import find_problems
from isanet_pl.data import CamVid, SegmentationFolder
from isanet_pl.data.dataset import code_table
from isanet_pl.data.files import read_mask
from isanet_pl.data.palette import default_palette
from isanet_pl.errors import InputError

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_dataset.py"
SPEC = importlib.util.spec_from_file_location("check_dataset", SCRIPT)
check_dataset = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_dataset)
NAMES = ["road", "tree", "sky"]


def write_pair(root, split, name, image, mask):
    for kind, pixels in (("images", image), ("masks", mask)):
        path = root / split / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture
def data_root(tmp_path):
    """A folder without anything wrong: 3 classes, 4 scenes a split, all of them different."""
    root = tmp_path / "my_data"
    for offset, split in enumerate(("train", "val", "test")):
        for index in range(4):
            scene = make_scene(10 * offset + index, (24 + index, 32), [0, 1, 2, 255])
            write_pair(root, split, f"scene{index}", *scene)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def find(root, **options):
    """Returns the (level, split, message) of what is wrong with a folder."""
    data = SegmentationFolder(root=str(root), **options)
    pairs, problems = check_dataset.list_splits(data)
    fingerprint = check_dataset.take_fingerprint(data, pairs, 1, Console(quiet=True))
    batch = options.get("batch_size", 1)
    problems += find_problems(fingerprint, data.eval_batch_size, batch, data.train_on_val)
    return [(p.level, p.split, p.message) for p in problems]


def run(*args):
    """Returns the exit code of the script, run in this process."""
    try:
        return check_dataset.main([*map(str, args), "--workers", "1"])
    except SystemExit as error:
        return error.code


def rewrite(path, change):
    """Replaces the pixels of a PNG."""
    with Image.open(path) as image:
        pixels = np.array(image)
    Image.fromarray(change(pixels).astype(np.uint8)).save(path)


def masks_of(root, split):
    return sorted((root / split / "masks").iterdir())


def test_a_clean_folder_is_fit_for_training(data_root, tmp_path, capsys):
    output = tmp_path / "report"
    options = ["--data", "SegmentationFolder", "--data.root", data_root, "--data.batch_size", 4]
    assert run(*options, "--output", output) == 0
    said = capsys.readouterr().out
    assert "fit for training: 0 errors, 0 warnings" in said
    assert all(name in said for name in NAMES)
    content = json.loads((output / "fingerprint.json").read_text())
    assert content["problems"] == []
    assert content["splits"]["train"]["sizes"] == [[24 + i, 32, 1] for i in range(4)]
    for name in ("contact_sheet.png", "classes.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 200


def read_all(root, split="train"):
    """Returns images and masks of a split, read without the project's code."""
    images = [np.array(Image.open(path)) for path in sorted((root / split / "images").iterdir())]
    return images, [np.array(Image.open(path)) for path in masks_of(root, split)]


@pytest.fixture
def pairs(data_root):
    return SegmentationFolder(root=str(data_root)).list_pairs("train")


@pytest.fixture
def read():
    return partial(read_pairs, table=code_table(3, None, False), read_codes=read_mask)


def test_numbers_are_those_of_numpy(data_root, pairs, read):
    images, masks = read_all(data_root)
    colours = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    labels = np.concatenate([mask.ravel() for mask in masks])
    split = summarise(read(pairs), code_table(3, None, False), 3, None)
    assert split.mean == pytest.approx(colours.mean(axis=0), rel=1e-12)
    assert split.std == pytest.approx(colours.std(axis=0), rel=1e-12)
    assert split.brightest == colours.max()
    assert list(split.class_pixels) == [(labels == i).sum() for i in range(3)]
    assert split.ignored_pixels == (labels == 255).sum()
    assert split.class_images == (4, 4, 4)
    assert split.pixels == labels.size
    assert split.shares == pytest.approx(
        [(labels == i).sum() / (labels < 3).sum() for i in range(3)]
    )
    assert split.size_at(0) == (24, 32)
    assert split.size_at(0.5) == (25, 32)
    assert split.size_at(1) == (27, 32)
    assert split.num_masks == 4
    assert split.codes == {code: (labels == code).sum() for code in (0, 1, 2, 255)}


def test_codes_are_translated_as_in_training(tmp_path):
    root = make_camvid(tmp_path / "camvid")  # void is 11 there
    data = CamVid(root=str(root))
    table = code_table(11, data.label_map, False)
    split = summarise(read_pairs(data.list_pairs("train"), table, read_mask), table, 11, 367)
    masks = [np.array(Image.open(path)) for path in (root / "train" / "labels").iterdir()]
    assert split.ignored_pixels == sum((mask == 11).sum() for mask in masks)
    assert split.outside_pixels == 0
    assert split.codes[11] == split.ignored_pixels


def test_the_largest_pair_of_a_class_is_found(data_root, read):
    mask = masks_of(data_root, "train")[2]
    rewrite(mask, lambda pixels: pixels * 0 + 1)
    pairs = SegmentationFolder(root=str(data_root)).list_pairs("train")
    split = summarise(read(pairs), code_table(3, None, False), 3, None)
    assert split.largest[1] == (str(pairs[2][0]), str(mask))


def test_adding_is_associative(data_root, read):
    broken = sorted((data_root / "train" / "images").iterdir())[1]
    truncate(broken)
    rewrite(masks_of(data_root, "train")[0], lambda pixels: pixels + 7)
    rewrite(masks_of(data_root, "train")[3], lambda pixels: pixels + 9)
    pairs = SegmentationFolder(root=str(data_root)).list_pairs("train")
    table = code_table(3, None, False)

    def together(groups):
        total = SplitFacts()
        for group in groups:
            total.add(read(group))
        return summarise(total, table, 3, None)

    expected = together([pairs])
    assert expected.files["unreadable"].count == 1
    assert together([[pair] for pair in pairs]) == expected
    assert together([pairs[:1], pairs[1:]]) == expected
    assert together([pairs[:3], [], pairs[3:]]) == expected


def test_kept_codes_and_names_do_not_depend_on_the_grouping():
    def outside(start):  # a mask of 40 codes without a class
        codes = range(start, start + 40)
        return SplitFacts(outside={c: Outside(1, Files(1, (f"mask{start}",))) for c in codes})

    def note(numbers):
        facts = SplitFacts()
        for number in numbers:
            facts.note("plain", f"{number:04d}")
        return facts

    left, right = SplitFacts(), SplitFacts()
    for start in (300, 310, 305, 290):
        left.add(outside(start))
    for start in (290, 305, 310, 300):
        right.add(outside(start))
    assert left.outside == right.outside
    assert len(left.outside) == CODES_KEPT
    assert left.outside[310].pixels == 4
    numbers = np.random.default_rng(0).permutation(500).tolist()
    one, two = note(numbers), note(numbers[:77])
    two.add(note(numbers[77:]))
    assert one.files == two.files
    assert one.files["plain"].count == 500
    assert one.files["plain"].first == tuple(f"{i:04d}" for i in range(FILES_KEPT))


def test_the_result_does_not_depend_on_the_workers(data_root, read):
    truncate(data_root / "val" / "images" / "scene1.png")
    data = SegmentationFolder(root=str(data_root))
    pairs = {split: data.list_pairs(split) * 3 for split in ("train", "val")}
    told = []
    alone = scan(pairs, read, 1, lambda split, count: told.append((split, count)))
    spread = scan(pairs, read, 2)
    assert sum(count for _, count in told) == 24
    for split in pairs:
        assert summarise(alone[split], code_table(3, None, False), 3, None) == summarise(
            spread[split], code_table(3, None, False), 3, None
        )
    assert find_duplicates(alone) == find_duplicates(spread)
    with pytest.raises(InputError, match="at least one process"):
        scan(pairs, read, 0)


def test_whatever_a_reader_raises_is_a_finding(pairs):
    def read_codes(path):
        raise RuntimeError("no such thing")

    facts = read_pairs(pairs, code_table(3, None, False), read_codes)
    assert facts.files["unreadable"].count == 4
    assert "RuntimeError: no such thing" in facts.files["unreadable"].first[0]
    assert str(pairs[0][1]) in facts.files["unreadable"].first[0]
    assert sum(facts.sizes.values()) == 4  # the images were read


def die(pairs):
    import os

    os._exit(9)


def test_a_killed_process_is_an_error_and_no_hang(pairs):
    with pytest.raises(InputError, match="killed"):
        scan({"train": pairs * 4}, die, 2)


def die_or_wait(pairs):
    import os

    if pairs[0][0].name == "dies":
        os._exit(9)
    time.sleep(60)


def test_a_killed_process_ends_the_others(tmp_path):
    # Also where the program itself listens for SIGTERM, as one that trains does.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        pairs = [(tmp_path / name, tmp_path) for name in ["waits"] * 4 + ["dies"]]
        since = time.monotonic()
        with pytest.raises(InputError, match="killed"):
            scan({"train": pairs}, die_or_wait, 2)
        assert time.monotonic() - since < 30
    finally:
        signal.signal(signal.SIGTERM, before)


# What is planted, and the (level, split, words) that must be said; nothing else may be.


def plant_truncated_image(root):
    truncate(root / "train" / "images" / "scene1.png")


def plant_empty_mask(root):
    (root / "val" / "masks" / "scene0.png").write_bytes(b"")


def plant_colour_mask(root):
    Image.new("RGB", (32, 24)).save(root / "test" / "masks" / "scene0.png")


def plant_other_size(root):
    rewrite(root / "val" / "masks" / "scene2.png", lambda pixels: pixels[:-1])


def plant_code(root):
    rewrite(root / "train" / "masks" / "scene3.png", lambda p: np.where(p == 1, 9, p))


def plant_wide_code(root):
    path = root / "train" / "masks" / "scene3.png"
    mask = np.array(Image.open(path)).astype(np.uint16)
    mask[mask == 1] = 1000
    Image.fromarray(mask).save(path)


def plant_counting_from_one(root):
    for split in ("train", "val", "test"):
        for path in masks_of(root, split):
            rewrite(path, lambda p: np.where(p < 255, p + 1, p))


def plant_one_class_too_many(root):
    rewrite(masks_of(root, "train")[0], lambda p: np.where(p == 255, 3, p))


def plant_jpeg(root):
    path = masks_of(root, "train")[0]
    mask = np.roll(np.array(Image.open(path)), 3, axis=1)  # not in step with JPEG's blocks
    Image.fromarray(mask).save(path, format="JPEG", quality=60)


def plant_all_ignored(root):
    for path in masks_of(root, "train"):
        rewrite(path, lambda p: p * 0 + 255)


def plant_one_ignored(root):
    rewrite(masks_of(root, "train")[1], lambda p: p * 0 + 255)


def plant_binary(root):
    for path in masks_of(root, "train"):
        rewrite(path, lambda p: np.where(p == 1, 255, 0))


def plant_much_ignored(root):
    for path in masks_of(root, "val"):
        rewrite(path, lambda p: np.where(np.arange(p.size).reshape(p.shape) % 5, 255, p))


def plant_missing_class(root):
    for path in masks_of(root, "train"):
        rewrite(path, lambda p: np.where(p == 2, 1, p))


def plant_absent_from_val(root):
    for path in masks_of(root, "val"):
        rewrite(path, lambda p: np.where(p == 2, 1, p))


def plant_first_class_missing(root):
    for split in ("train", "val", "test"):
        for path in masks_of(root, split):
            rewrite(path, lambda p: np.where(p == 0, 1, p))


def copy_image(root, source, target):
    path = root / f"{target}.png"
    Image.open(root / f"{source}.png").save(path, compress_level=1)  # other bytes, same picture
    size = Image.open(path).size
    mask = Path(str(path).replace("images", "masks"))
    Image.open(mask).resize(size, Image.Resampling.NEAREST).save(mask)


def plant_leak(root):
    copy_image(root, "train/images/scene0", "val/images/scene3")


def plant_listed_leak(root):
    for kind in ("images", "masks"):
        (root / kind).mkdir()
        for path in root.glob(f"*/{kind}/*"):
            path.rename(root / kind / f"{path.parts[-3]}_{path.name}")
    for split in ("train", "val", "test"):
        shutil.rmtree(root / split)
        names = [path.name for path in (root / "images").glob(f"{split}_*")]
        (root / f"{split}.txt").write_text("\n".join(names))
    with (root / "val.txt").open("a") as file:
        file.write("\ntrain_scene0")


def plant_test_leak(root):
    copy_image(root, "train/images/scene0", "test/images/scene3")


def plant_duplicate(root):
    for kind in ("images", "masks"):
        file = root / "train" / kind / "scene0.png"
        (root / "train" / kind / "again.png").write_bytes(file.read_bytes())


def plant_conflict(root):
    copy_image(root, "train/images/scene0", "train/images/scene1")


def plant_no_val(root):
    for path in (root / "val" / "images").iterdir():
        path.unlink()


def plant_no_test(root):
    (root / "test").rename(root / "elsewhere")


def plant_no_partner(root):
    (root / "train" / "masks" / "scene0.png").unlink()


def plant_same_masks(root):
    for path in masks_of(root, "val"):
        index = path.stem[-1]
        image, mask = make_scene(50 + int(index), (24, 32), [0, 1, 2, 255])
        mask = make_scene(50, (24, 32), [0, 1, 2, 255])[1]
        write_pair(root, "val", path.stem, image, mask)


def plant_copied_mask(root):
    mask = Image.open(root / "train" / "masks" / "scene0.png")
    Image.merge("RGB", [mask] * 3).save(root / "train" / "images" / "scene0.png")


def plant_plain_image(root):
    rewrite(root / "train" / "images" / "scene0.png", lambda p: p * 0 + 90)


def plant_plain_images_of_two_shapes(root):
    # As many pixels of one colour, but not the same image.
    for index, size in enumerate([(24, 32), (32, 24)]):
        mask = make_scene(70 + index, size, [0, 1, 2])[1]
        write_pair(root, "train", f"plain{index}", np.full((*size, 3), 90, np.uint8), mask)


def plant_black_image_of_background(root):
    zeros = np.zeros((24, 32), np.uint8)
    write_pair(root, "train", "scene0", np.stack([zeros] * 3, axis=-1), zeros)


def plant_dark_images(root):
    for path in (root / "test" / "images").iterdir():
        rewrite(path, lambda p: p // 20)


def plant_palettes_of_their_own(root):
    # As programs that number the colours of each file anew; both masks look alike.
    colours = {0: (0, 0, 0), 1: (0, 0, 9), 2: (0, 9, 0), 255: (9, 9, 9)}
    for path, order in zip(masks_of(root, "val"), ([0, 2, 1], [0, 1, 2]), strict=False):
        pixels = np.array(Image.open(path))
        codes = np.select([pixels == value for value in order], range(3), 255)
        mask = Image.fromarray(codes.astype(np.uint8))
        shown = [colours[value] for value in order] + [colours[255]] * 253
        mask.putpalette([part for colour in shown for part in colour])
        mask.save(path)


PLANTED = [
    (
        plant_truncated_image,
        [("error", "train", "1 file that cannot be read: cannot read", "scene1")],
    ),
    (plant_empty_mask, [("error", "val", "cannot be read", "masks/scene0.png", "empty")]),
    (plant_colour_mask, [("error", "test", "cannot be read", "is an RGB image")]),
    (plant_other_size, [("error", "val", "1 mask of another size than", "32x26", "32x25")]),
    (plant_code, [("error", "train", "1 mask with values", "(9 in ", "scene3", "label_map")]),
    (plant_wide_code, [("error", "train", "1 mask with values", "(1000 in ", "scene3")]),
    (
        plant_counting_from_one,
        [("error", split, "(3 in ", "reduce_zero_label") for split in ("train", "val", "test")]
        + [("warning", "train", "never seen", "road")],
    ),
    (
        plant_one_class_too_many,
        [("error", "train", "0 to 3, one value more", "label_map '{0: 0, 1: 1, 2: 2, 3: 255}'")],
    ),
    (
        plant_jpeg,
        [
            ("error", "train", "such values come from JPEG"),
            ("warning", "train", "1 mask saved as JPEG"),
        ],
    ),
    (plant_all_ignored, [("error", "train", "every pixel of all 4 masks is ignored")]),
    (plant_one_ignored, [("warning", "train", "1 mask ignored altogether", "scene1")]),
    (
        plant_binary,
        [
            ("error", "train", "road is the only class", "label_map '{0: 0, 255: 1}'"),
            ("warning", "train", "never learnt: tree, sky"),
            ("warning", "val", "not in train, so always wrong: tree, sky"),
            ("warning", "test", "not in train, so always wrong: tree, sky"),
        ],
    ),
    (plant_much_ignored, [("warning", "val", "of the pixels are ignored")]),
    (
        plant_missing_class,
        [
            ("warning", "train", "never seen, so never learnt: sky"),
            ("warning", "val", "always wrong: sky"),
            ("warning", "test", "always wrong: sky"),
        ],
    ),
    (plant_absent_from_val, [("warning", "val", "not evaluated: sky")]),
    (plant_first_class_missing, [("warning", "train", "road", "do the masks count from 1?")]),
    (
        plant_leak,
        [
            (
                "error",
                "train and val",
                "1 image in more than one split",
                "train/images/scene0",
                "val/images",
            )
        ],
    ),
    (
        plant_listed_leak,
        [
            (
                "error",
                "train and val",
                "in more than one split",
                "leave it in one",
                "images/train_scene0",
            )
        ],
    ),
    (plant_test_leak, [("error", "train and test", "1 image in more than one split")]),
    (plant_duplicate, [("warning", "train", "more than once", "again.png")]),
    (
        plant_conflict,
        [("warning", "train", "more than once"), ("warning", "", "different masks", "scene1")],
    ),
    (plant_no_val, [("error", "val", "no file in")]),
    (plant_no_test, [("warning", "test", "test split not found", "only `isanet-pl test`")]),
    (plant_no_partner, [("error", "train", "have no mask of the same name", "scene0")]),
    (plant_same_masks, [("warning", "val", "all 4 masks are the same")]),
    (plant_copied_mask, [("warning", "train", "very pixels of the image", "scene0")]),
    (plant_plain_image, [("warning", "train", "one single colour", "scene0")]),
    (plant_plain_images_of_two_shapes, [("warning", "train", "2 images of one single colour")]),
    (plant_black_image_of_background, [("warning", "train", "1 image of one single colour")]),
    (plant_dark_images, [("warning", "test", "brightest value", "of 255")]),
    (
        plant_palettes_of_their_own,
        [("warning", "val", "the value 1 is", "(0, 9, 0) in", "scene0", "(0, 0, 9) in", "scene1")],
    ),
]


@pytest.mark.parametrize(("plant", "expected"), PLANTED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_wrong_is_found_and_nothing_else(data_root, plant, expected):
    plant(data_root)
    found = find(data_root)
    for level, split, *words in expected:
        matching = [m for have, where, m in found if (have, where) == (level, split)]
        assert any(all(word in message for word in words) for message in matching), found
    assert len(found) == len(expected), found


def test_advice_knows_what_is_translated_already(data_root):
    plant_first_class_missing(data_root)  # now masks hold 1, 2 and 255
    for path in [p for split in ("train", "val") for p in masks_of(data_root, split)]:
        rewrite(path, lambda p: np.where(np.arange(p.size).reshape(p.shape) % 4, 0, p))
    translated = {"label_map": {0: 255, 7: 0, 1: 1, 2: 2, 255: 255}}
    found = {(split, message) for _, split, message in find(data_root, **translated)}
    assert ("train", "never seen, so never learnt: road") in found  # of code 7
    shares = [message for _, message in found if "of the pixels are ignored" in message]
    assert len(shares) == 2
    assert not any("255" in message for message in shares)


def test_a_stray_code_among_translated_ones_is_no_void(data_root):
    for split in ("train", "val", "test"):
        for path in masks_of(data_root, split):
            rewrite(path, lambda p: np.where(p < 255, 10 * p, p))
    rewrite(masks_of(data_root, "train")[0], lambda p: np.where(p == 20, 3, p))
    found = find(data_root, label_map={0: 0, 10: 1, 20: 2, 255: 255})
    [(level, split, message)] = found
    assert (level, split) == ("error", "train")
    assert "correct the masks or the class names" in message


def test_a_batch_may_hold_validation_images_where_they_are_trained_on(data_root):
    def told(**options):
        return [m for _, _, m in find(data_root, **options) if "fewer than one batch" in m]

    assert told(batch_size=6)[0].startswith("4 images are")
    assert told(batch_size=6, train_on_val=True) == []
    assert told(batch_size=9, train_on_val=True)[0].startswith("8 images are")


def test_names_that_are_no_utf8_are_told_and_drawn(data_root, tmp_path):
    name = os.fsdecode(b"m\xfcller.png")
    for kind in ("images", "masks"):
        (data_root / "train" / kind / "scene0.png").rename(data_root / "train" / kind / name)
    truncate(data_root / "train" / "masks" / name)
    image, mask = make_scene(90, (24, 32), [0, 1, 2])
    write_pair(data_root, "train", os.fsdecode(b"gr\xfcn"), image, mask)
    command = [sys.executable, check_dataset.__file__, "--data", "SegmentationFolder"]
    command += ["--data.root", str(data_root), "--workers", "1"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=strict)
    assert done.returncode == 1, done.stderr
    assert "cannot be read: cannot read train/masks/m?ller.png" in done.stdout.decode()
    report = tmp_path / "runs" / "dataset_check" / data_root.name
    assert (report / "contact_sheet.png").is_file()


def test_pictures_show_classes_and_wrong_codes(data_root):
    plant_code(data_root)
    pairs = SegmentationFolder(root=str(data_root)).list_pairs("train")
    table, palette = code_table(3, None, False), default_palette(3)
    shown = [read_thumbnail(pair, table, read_mask, edge=20) for pair in pairs]
    assert max(shown[3].image.shape) == 20
    assert shown[3].image.shape[:2] == shown[3].classes.shape
    assert set(np.unique(shown[3].classes)) == {0, 2, 254, 255}
    legend = draw_contact_sheet({"train": shown}, NAMES, palette).legends[0]
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["0 road", "1 tree", "2 sky", "NO CLASS", "ignored: undimmed"]
    legend = draw_contact_sheet({"train": shown[:3]}, NAMES, palette).legends[0]
    assert "NO CLASS" not in [text.get_text() for text in legend.get_texts()]
    figure = draw_classes({0: shown[0], 2: shown[3]}, NAMES, [0.25, 0.25, 0.5])
    assert [axis.get_title() for axis in figure.axes][:2] == ["0 road  25 %", "2 sky  50 %"]
    picture = figure.axes[1].get_images()[0].get_array()
    inside = shown[3].classes == 2
    assert (picture[inside] == shown[3].image[inside]).all()
    assert not (picture[~inside] == shown[3].image[~inside]).all(axis=1).any()


def test_an_unreadable_pair_has_no_thumbnail(data_root):
    plant_truncated_image(data_root)
    pairs = SegmentationFolder(root=str(data_root)).list_pairs("train")
    shown = [read_thumbnail(pair, code_table(3, None, False), read_mask, 20) for pair in pairs]
    assert [thumbnail is None for thumbnail in shown] == [False, True, False, False]


def test_lines_tell_the_progress_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(check_dataset, "LINE_SECONDS", -1)
    with check_dataset.show_progress(Console(force_terminal=False), 8) as advance:
        advance("train", 2)
        advance("val", 6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 2 of 8 pairs read, ")
    assert lines[1].startswith("val: 8 of 8 pairs read, 0.0 min left")
    assert lines[2].startswith("8 pairs read in ")


def test_ctrl_c_ends_without_a_stack_trace(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(check_dataset, "scan", interrupt)
    assert run("--data", "SegmentationFolder", "--data.root", data_root) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_all_of_a_broken_folder_is_told(data_root, tmp_path, capsys):
    plant_truncated_image(data_root)
    plant_code(data_root)
    plant_no_test(data_root)
    output = tmp_path / "report"
    options = ["--data", "SegmentationFolder", "--data.root", data_root, "--data.batch_size", 4]
    assert run(*options, "--output", output) == 1
    said = capsys.readouterr().out
    assert "not fit for training: 2 errors, 1 warning\n" in said
    assert "error train: 1 mask with values" in said
    levels = [p["level"] for p in json.loads((output / "fingerprint.json").read_text())["problems"]]
    assert levels == ["error", "error", "warning"]
    assert (output / "contact_sheet.png").is_file()


def test_nothing_readable_is_an_error_and_no_crash(data_root, tmp_path):
    for path in data_root.rglob("*.png"):
        truncate(path, 0.3)
    options = ["--data", "SegmentationFolder", "--data.root", data_root]
    assert run(*options, "--output", tmp_path / "report") == 1


def test_documented_counts_are_compared(tmp_path, capsys):
    make_camvid(tmp_path / "camvid")
    assert run("--data", "CamVid", "--data.root", tmp_path / "camvid", "--output", tmp_path) == 1
    said = capsys.readouterr().out
    assert "2 pairs were found, 367 are documented" in said
    assert "images in more than one split" in said  # the scenes of its splits are the same ones


def test_fewer_images_than_a_batch_are_an_error(data_root, tmp_path, capsys):
    options = ["--data", "SegmentationFolder", "--data.root", data_root, "--data.batch_size"]
    assert run(*options, 5, "--output", tmp_path / "report") == 1
    assert "fewer than one batch of 5: set --data.batch_size 4" in capsys.readouterr().out


def test_sizes_that_cannot_be_evaluated_together_are_an_error(data_root):
    found = find(data_root, eval_batch_size=2)
    assert ("error", "val") in [(level, split) for level, split, _ in found]
    assert any("--data.eval_batch_size 1" in message for *_, message in found)


@pytest.mark.parametrize("path", sorted((SCRIPT.parent.parent / "configs").glob("*.yaml")), ids=str)
def test_the_data_of_every_config_are_found(path, data_root):
    overlay = data_root / "overlay.yaml"
    overlay.write_text("data: {init_args: {batch_size: 3}}\nname: other\nseed_everything: 1\n")
    args = ["--config", str(path), "--config", str(overlay), "--data.root", str(data_root)]
    options = check_dataset.parse(args)
    if options.data.class_path.endswith("Synthetic"):
        with pytest.raises(InputError, match="it has no files"):
            check_dataset.build_data(options)
        return
    data = check_dataset.build_data(options)
    assert data.batch_size == 3
    assert data.root_path == data_root
    if path.stem == "camvid_isanet_r18-d8":  # from a file that the config names
        assert options.data.init_args.crop_size == (320, 416)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("ADE20K", layouts.make_ade20k),
        ("Cityscapes", layouts.make_cityscapes),
        ("VOC", layouts.make_voc),
        ("PascalContext", layouts.make_context),
        ("COCOStuff10k", layouts.make_coco10k),
        ("COCOStuff164k", layouts.make_coco164k),
        ("LIP", layouts.make_lip),
    ],
)
def test_official_data_sets_have_all_their_labels_in_the_list(name, make, tmp_path):
    data = getattr(isanet_pl.data, name)(root=str(make(tmp_path)))
    pairs, problems = check_dataset.list_splits(data)
    assert not problems
    assert list(pairs) == ["train", "val"]  # test is val
    pairs["train"] = pairs["train"] * 4  # for processes: the codes' reader must go there
    fingerprint = check_dataset.take_fingerprint(data, pairs, 2, Console(quiet=True))
    for split in fingerprint.splits.values():
        assert split.outside_pixels == 0
        assert "unreadable" not in split.files
        assert sum(split.class_pixels) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "data"),
        (["--data", "Nowhere"], "Nowhere"),
        (["--data", "CamVid", "--data.colour", "1"], "colour"),
        (["--data", "CamVid"], "--data.root DIR"),
        (["--data", "CamVid", "--data.root", "no/such/folder"], "no such folder"),
        (["--data", "Synthetic"], "Synthetic makes its images itself"),
        (["--data", "SegmentationFolder", "--data.root", "."], "class names are missing"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(data_root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = ["--data", "SegmentationFolder", "--data.root", data_root]
    assert run(*options, "--output", tmp_path / "file" / "report") == 2
    assert f"cannot access {tmp_path / 'file' / 'report'}" in capsys.readouterr().err


def test_the_script_runs_on_all_cores_as_users_run_it(data_root, tmp_path):
    command = [sys.executable, SCRIPT, "--data", "SegmentationFolder", "--data.root", data_root]
    command += ["--data.batch_size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "runs" / "dataset_check" / "my_data"
    names = ["classes.png", "contact_sheet.png", "fingerprint.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "written to runs/dataset_check/my_data" in done.stdout
