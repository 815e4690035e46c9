"""Finding and reading files: what is read is what the file shows, what is wrong is named."""

import errno
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails_naming, truncate
from PIL import ExifTags, Image

from isanet_pl.data.files import (
    IMAGE_SUFFIXES,
    INVALID,
    MASK_SUFFIXES,
    displayed_size,
    list_files,
    map_codes,
    pair_by_stem,
    read_image,
    read_mask,
    read_top,
)
from isanet_pl.errors import InputError

# How a viewer turns the stored pixels for each EXIF orientation, from the EXIF standard.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def noise(height=20, width=30, channels=3):
    """Returns uint8 pixels without any symmetry."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pixels(path):
    """Returns what read_image gives as (H, W, 3), after checking its type."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


# list_files


def test_list_files_takes_the_endings_it_is_given(tmp_path):
    touch(tmp_path / "b.png", tmp_path / "a.JPG", tmp_path / "notes.txt", tmp_path / "png")
    (tmp_path / "folder.png").mkdir()
    assert list_files(tmp_path, IMAGE_SUFFIXES) == [tmp_path / "a.JPG", tmp_path / "b.png"]
    assert list_files(tmp_path, MASK_SUFFIXES) == [tmp_path / "b.png"]


@pytest.mark.parametrize("recursive", [False, True])
def test_hidden_files_are_no_data(tmp_path, recursive):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png"):
        (tmp_path / name).touch()
    hidden = tmp_path / ".data"  # but the folder itself may be
    hidden.mkdir()
    (hidden / "b.png").touch()
    assert list_files(tmp_path, frozenset({".png"}), recursive) == [tmp_path / "a.png"]
    assert list_files(hidden, frozenset({".png"}), recursive) == [hidden / "b.png"]


def test_list_files_goes_into_folders_only_when_told(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "x" / "b.jpg", tmp_path / "x" / "y" / "c.webp"]
    touch(*files, tmp_path / "x" / "d.csv")
    assert list_files(tmp_path, IMAGE_SUFFIXES) == files[:1]
    assert list_files(tmp_path, IMAGE_SUFFIXES, recursive=True) == files


@pytest.mark.parametrize("place", [".", "./x", "x/", "../here"])
def test_list_files_goes_into_folders_of_any_spelling(tmp_path, monkeypatch, place):
    here = tmp_path / "here"
    touch(here / "x" / "y" / "a.png")
    monkeypatch.chdir(here)
    (found,) = list_files(Path(place), IMAGE_SUFFIXES, recursive=True)
    assert found.resolve() == here / "x" / "y" / "a.png"


def test_list_files_follows_links_to_folders_but_not_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    touch(folder / "a.png", elsewhere / "b.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)  # another name is another file
    (elsewhere / "up").symlink_to(folder)
    (folder / "self").symlink_to(".")
    files = [folder / "a.png", folder / "again" / "b.png", folder / "linked" / "b.png"]
    assert list_files(folder, IMAGE_SUFFIXES, recursive=True) == files


def test_a_folder_below_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    touch(tmp_path / "a.png", closed / "b.png")
    scan = os.scandir

    def scandir(path):  # the tests may run as root, who may read everything
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with fails_naming(f"cannot read the folder {closed}: Permission denied"):
        list_files(tmp_path, IMAGE_SUFFIXES, recursive=True)


def test_list_files_refuses_missing_and_empty_folders(tmp_path):
    with fails_naming(tmp_path / "nowhere"):
        list_files(tmp_path / "nowhere", IMAGE_SUFFIXES)
    touch(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=rf"no file in {re.escape(str(tmp_path))}.*\.png"):
        list_files(tmp_path, IMAGE_SUFFIXES)
    with pytest.raises(InputError, match="a folder is wanted, not the file"):
        list_files(tmp_path / "notes.txt", IMAGE_SUFFIXES)


# pair_by_stem


def test_pairs_have_one_stem_and_are_sorted(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / "b.jpg", images / "a.png", images / "c.d.JPEG", images / "readme.txt")
    touch(masks / "a.png", masks / "b.PNG", masks / "c.d.tif", masks / "a.json")
    assert pair_by_stem(images, masks) == [
        (images / "a.png", masks / "a.png"),
        (images / "b.jpg", masks / "b.PNG"),
        (images / "c.d.JPEG", masks / "c.d.tif"),
    ]


def test_image_without_mask_is_named(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / "a.jpg", images / "b.jpg", masks / "a.png")
    with pytest.raises(InputError, match="no mask of the same name") as error:
        pair_by_stem(images, masks)
    assert str(images / "b.jpg") in str(error.value)
    assert str(masks) in str(error.value)
    assert str(images / "a.jpg") not in str(error.value)


def test_mask_without_image_is_named(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / "a.jpg", masks / "a.png", masks / "b.png")
    with pytest.raises(InputError, match="no image of the same name") as error:
        pair_by_stem(images, masks)
    assert str(masks / "b.png") in str(error.value)
    assert str(images) in str(error.value)


def test_many_files_without_partner_are_counted_not_all_named(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(*(images / f"{i:02}.jpg" for i in range(20)), masks / "00.png")
    with pytest.raises(InputError, match=r"19 of 20 .* and 14 more"):
        pair_by_stem(images, masks)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_one_stem_twice_is_refused(tmp_path, folder):
    touch(tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png")
    touch(tmp_path / folder / "a.bmp")
    with pytest.raises(InputError, match="remove one") as error:
        pair_by_stem(tmp_path / "images", tmp_path / "masks")
    assert str(tmp_path / folder / "a.png") in str(error.value)
    assert str(tmp_path / folder / "a.bmp") in str(error.value)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_missing_or_empty_folder_of_a_pair_is_named(tmp_path, folder):
    touch(tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png")
    (tmp_path / folder / "a.png").unlink()
    with fails_naming(tmp_path / folder):
        pair_by_stem(tmp_path / "images", tmp_path / "masks")
    (tmp_path / folder).rmdir()
    with fails_naming(tmp_path / folder):
        pair_by_stem(tmp_path / "images", tmp_path / "masks")


# read_image: colour modes


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm"])
def test_rgb_is_read_as_it_is(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise()).save(path, **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(pixels(path), noise())
    assert displayed_size(path) == (20, 30)


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = noise(channels=1)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))
    assert displayed_size(tmp_path / "a.png") == (20, 30)


def test_one_bit_becomes_black_and_white(tmp_path):
    bits = noise(channels=1) > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.stack([bits * 255] * 3, axis=-1))


def test_palette_becomes_its_colours(tmp_path):
    indices, colours = noise(channels=1) % 4, noise(4, 1)[:, 0]
    image = Image.fromarray(indices)
    image.putpalette(colours.flatten().tolist())
    image.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), colours[indices])
    assert displayed_size(tmp_path / "a.png") == (20, 30)


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_is_dropped_colours_stay(tmp_path, channels):
    image = noise(channels=channels)
    image[:10, ..., -1] = 0  # see-through pixels keep the colour that is stored below
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = image[..., :3] if channels == 4 else np.repeat(image[..., :1], 3, axis=-1)
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)
    assert displayed_size(tmp_path / "a.png") == (20, 30)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    # Each ink alone takes one colour out of white.
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 0, 255): (0,) * 3}
    for ink, colour in inks.items():
        Image.new("CMYK", (30, 20), ink).save(tmp_path / "a.jpg", quality=95)
        assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
        seen = pixels(tmp_path / "a.jpg").astype(int)
        assert seen.shape == (20, 30, 3)
        assert abs(seen - colour).max() <= 4
        assert displayed_size(tmp_path / "a.jpg") == (20, 30)


def test_sixteen_bit_grey_keeps_its_upper_eight_bits(tmp_path):
    grey = np.array([[0, 255, 256], [511, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "I;16"
    expected = np.array([[0, 0, 1], [1, 128, 255]])
    assert np.array_equal(pixels(tmp_path / "a.png"), np.stack([expected] * 3, axis=-1))
    assert displayed_size(tmp_path / "a.png") == (2, 3)


def test_sixteen_bits_of_either_byte_order(tmp_path):
    grey = np.array([[0, 255, 256], [511, 32768, 65535]], dtype=">u2")
    for order in ("<", ">"):
        image = Image.frombytes(
            "I;16" if order == "<" else "I;16B", (3, 2), grey.astype(f"{order}u2").tobytes()
        )
        image.save(tmp_path / "a.tif")
        assert pixels(tmp_path / "a.tif")[..., 0].tolist() == [[0, 0, 1], [1, 128, 255]]


@pytest.mark.parametrize(
    ("dtype", "mode"), [(np.float32, "F"), (np.int32, "I"), (np.uint16, "I;16")]
)
def test_numbers_that_are_no_brightness_are_refused(tmp_path, dtype, mode):
    """They would all be black."""
    Image.fromarray(np.array([[0, 1], [1, 0]], dtype=dtype)).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == mode
    with fails_naming(tmp_path / "a.tif", f"mode {mode} ", "do not say what is white"):
        read_image(tmp_path / "a.tif")


# read_image: orientation


def save_turned(path, image, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(image).save(path, exif=exif, **lossless)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, ending, orientation):
    path, upright = tmp_path / f"turned.{ending}", tmp_path / f"upright.{ending}"
    save_turned(path, noise(), orientation)
    save_turned(upright, noise(), 1)
    stored = np.array(Image.open(upright).convert("RGB"))  # what JPEG made of the picture
    seen = pixels(path)
    assert np.array_equal(seen, TURNS[orientation](stored))
    assert displayed_size(path) == seen.shape[:2]


def exif_orientation(kind, count, value):
    """Returns an EXIF block with one entry, the orientation, of any TIFF type."""
    entry = struct.pack("<HHI4s", ExifTags.Base.Orientation, kind, count, value)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0nonsense",
        exif_orientation(3, 1, b"\0\0\0\0"),
        exif_orientation(3, 1, b"\x09\0\0\0"),
        exif_orientation(2, 2, b"6\0\0\0"),
    ],
    ids=["nonsense", "zero", "nine", "text"],
)
def test_orientation_that_means_nothing_is_ignored(tmp_path, exif):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise()).save(path, exif=exif)
    assert pixels(path).shape == (20, 30, 3)
    assert displayed_size(path) == (20, 30)


# Files that cannot be read


READERS = pytest.mark.parametrize("reader", [read_image, read_mask, displayed_size])


@READERS
def test_missing_file_is_named(tmp_path, reader):
    with fails_naming(tmp_path / "a.png"):
        reader(tmp_path / "a.png")


@READERS
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_zero_byte_file_is_named(tmp_path, reader, ending):
    touch(tmp_path / f"a.{ending}")
    with fails_naming(tmp_path / f"a.{ending}", "empty", "restore or remove"):
        reader(tmp_path / f"a.{ending}")


@READERS
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_file_that_is_no_image_is_named(tmp_path, reader, ending):
    (tmp_path / f"a.{ending}").write_text("<html>404 not found</html>")
    with fails_naming(tmp_path / f"a.{ending}", "no image", "restore or remove"):
        reader(tmp_path / f"a.{ending}")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp"])
def test_truncated_image_is_named(tmp_path, ending, share):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise(200, 300)).save(path)
    read_image(path)
    truncate(path, share)
    with fails_naming(path, "restore or remove"):
        read_image(path)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_truncated_mask_is_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise(200, 300, channels=1)).save(path)
    read_mask(path)
    truncate(path)
    with fails_naming(path, "restore or remove"):
        read_mask(path)


@pytest.mark.parametrize(
    "ending",
    [
        "png",
        "jpg",
        "webp",
    ],
)
def test_size_of_a_truncated_image_is_known_or_the_file_is_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(noise(200, 300)).save(path)
    truncate(path)
    try:
        seen = displayed_size(path)
    except InputError as error:
        seen = str(error)
    assert seen == (200, 300) or str(path) in seen


# read_mask


def test_palette_mask_gives_indices_not_colours(tmp_path):
    indices = noise(channels=1) % 12
    image = Image.fromarray(indices)
    image.putpalette(noise(12, 1).flatten().tolist())
    image.save(tmp_path / "a.png")
    codes = read_mask(tmp_path / "a.png")
    assert codes.dtype == np.uint8
    assert np.array_equal(codes, indices)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_grey_mask_gives_its_values(tmp_path, ending):
    values = noise(channels=1)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    codes = read_mask(tmp_path / f"a.{ending}")
    assert codes.dtype == np.uint8
    assert np.array_equal(codes, values)


def test_one_bit_mask_gives_zero_and_one(tmp_path):
    bits = noise(channels=1) > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    codes = read_mask(tmp_path / "a.png")
    assert codes.dtype == np.uint8
    assert np.array_equal(codes, bits)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_mask_is_not_cut_to_eight(tmp_path, ending):
    values = np.array([[0, 1, 255], [256, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    codes = read_mask(tmp_path / f"a.{ending}")
    assert codes.dtype == np.int64
    assert np.array_equal(codes, values)


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (4, "RGBA"), (2, "LA")])
def test_colour_mask_is_refused(tmp_path, channels, mode):
    Image.fromarray(noise(channels=channels)).save(tmp_path / "a.png")
    with fails_naming(tmp_path / "a.png", mode, "map its colours to indices"):
        read_mask(tmp_path / "a.png")


# map_codes


def table_of(classes):
    """Returns the lookup table of a {code: class}."""
    table = np.full(256, INVALID, dtype=np.uint8)
    for code, index in classes.items():
        table[code] = index
    return table


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_codes_become_classes(tmp_path, dtype):
    codes = np.array([[0, 7, 255], [9, 7, 0]], dtype=dtype)
    table = table_of({0: 2, 7: 0, 9: 255, 255: 255})
    classes = map_codes(codes, table, 3, tmp_path / "a.png")
    assert classes.numpy().dtype == np.uint8
    assert classes.tolist() == [[2, 0, 255], [255, 0, 2]]


def test_wrong_code_is_named_with_its_file(tmp_path):
    codes = np.array([[0, 1], [1, 200]], dtype=np.uint8)
    with fails_naming(tmp_path / "a.png", "value 200,", "2 classes", "label_map"):
        map_codes(codes, table_of({0: 0, 1: 1}), 2, tmp_path / "a.png")


def test_several_wrong_codes_are_named_once_each(tmp_path):
    codes = np.array([[9, 8, 9, 8, 0]], dtype=np.uint8)
    with fails_naming(tmp_path / "a.png", "value 8, 9,"):
        map_codes(codes, table_of({0: 0}), 1, tmp_path / "a.png")
    everything = np.arange(256, dtype=np.uint8)[None]
    with fails_naming(tmp_path / "a.png", "value 1, 2, 3, 4, 5 and 250 more"):
        map_codes(everything, table_of({0: 0}), 1, tmp_path / "a.png")


@pytest.mark.parametrize("code", [256, 257, 65535, -1])
def test_code_outside_a_byte_does_not_wrap_around(tmp_path, code):
    # 256 would wrap to 0, a class; -1 and 65535 to 255, ignored.
    codes = np.array([[0, code]], dtype=np.int64)
    with fails_naming(tmp_path / "a.png", f"value {code},"):
        map_codes(codes, table_of({0: 0, 1: 1, 255: 255}), 2, tmp_path / "a.png")


@pytest.mark.parametrize("orientation", TURNS)
def test_mask_is_turned_like_its_image(tmp_path, orientation):
    path = tmp_path / "turned.png"
    codes = noise(channels=1)
    save_turned(path, codes, orientation)
    assert np.array_equal(read_mask(path), TURNS[orientation](codes))


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, content=b""):
    """Returns a part of a PNG file."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_give_the_codes_as_stored(tmp_path, bits):
    # Pillow writes such files only for palettes, so this one is put together by hand.
    codes = np.arange(8, dtype=np.uint8)[None] % 2**bits
    packed = int("".join(f"{code:0{bits}b}" for code in codes[0]), 2).to_bytes(bits, "big")

    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    data = zlib.compress(b"\0" + packed)
    path = tmp_path / "few.png"
    path.write_bytes(SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND"))
    assert np.array_equal(read_mask(path), codes)


# read_top


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("rows", [1, 13, 20])
def test_top_of_a_png_is_that_of_the_image(tmp_path, mode, rows):
    path = tmp_path / "a.png"
    Image.fromarray(noise()).convert(mode).save(path)
    top = read_top(path, rows, (20, 30))
    assert torch.equal(top, read_image(path)[:, :rows])
    assert top.is_contiguous() or top.permute(1, 2, 0).is_contiguous()


def test_top_of_a_large_png_of_several_chunks(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().count(b"IDAT") > 3
    for rows in (1, 150, 299):
        top = read_top(tmp_path / "a.png", rows, (300, 500))
        assert np.array_equal(top.permute(1, 2, 0), pixels[:rows])


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "I;16"])
def test_top_leaves_other_modes_alone(tmp_path, mode):
    grey = Image.fromarray(noise(channels=1))
    (grey.convert("I").convert(mode) if mode == "I;16" else grey.convert(mode)).save(
        tmp_path / "a.png"
    )
    assert read_top(tmp_path / "a.png", 5, (20, 30)) is None


@pytest.mark.parametrize("ending", ["jpg", "webp", "tif", "bmp"])
def test_top_leaves_other_formats_alone(tmp_path, ending):
    Image.fromarray(noise()).save(tmp_path / f"a.{ending}")
    assert read_top(tmp_path / f"a.{ending}", 5, (20, 30)) is None


def test_top_leaves_another_size_alone(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    assert read_top(tmp_path / "a.png", 5, (30, 20)) is None


@pytest.mark.parametrize("where", ["before the pixels", "after the pixels"])
def test_top_leaves_a_turned_image_alone(tmp_path, where):
    path = tmp_path / "a.png"
    save_turned(path, noise(), 3)
    content = path.read_bytes()
    if where == "after the pixels":
        at = content.index(b"eXIf") - 4
        length = 12 + struct.unpack(">I", content[at : at + 4])[0]
        block, content = content[at : at + length], content[:at] + content[at + length :]
        end = content.index(b"IEND") - 4
        path.write_bytes(content[:end] + block + content[end:])
        with Image.open(path) as image:
            assert "exif" not in image.info  # not before it is decoded
    assert read_top(path, 5, (20, 30)) is None


def test_top_leaves_an_interlaced_image_alone(tmp_path):
    # One pixel needs one pass only, so this is a whole interlaced file.
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 1)
    data = chunk(b"IDAT", zlib.compress(b"\0\x55"))
    (tmp_path / "a.png").write_bytes(SIGNATURE + chunk(b"IHDR", header) + data + chunk(b"IEND"))
    assert read_image(tmp_path / "a.png").flatten().tolist() == [0x55] * 3
    assert read_top(tmp_path / "a.png", 1, (1, 1)) is None


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_top_of_a_truncated_file_names_it(tmp_path, share):
    path = tmp_path / "a.png"
    Image.fromarray(noise()).save(path)
    truncate(path, share)
    with fails_naming("cannot read", path):
        read_top(path, 20, (20, 30))
