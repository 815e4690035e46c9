"""Image and mask files: finding the pairs and reading them, with errors that name the file."""

import contextlib
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from isanet_pl.errors import InputError, few
from isanet_pl.pixels import rgb_pixels

IGNORE = 255
INVALID = 254  # what a lookup table gives for a code that is neither a class nor ignored

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff", ".gif"})

MAX_PIXELS = 2 * 89_478_485
"""Pixels of an image beyond which it is refused, unless more are allowed; Pillow's own limit."""

# What Pillow raises for an EXIF block that means nothing.
MEANINGLESS = (SyntaxError, struct.error, TypeError, ValueError, KeyError, OSError)

Pair = tuple[Path, Path]
Codes = npt.NDArray[np.int64] | npt.NDArray[np.uint8]


def list_files(folder: Path, suffixes: frozenset[str], recursive: bool = False) -> list[Path]:
    """Returns the files of a folder that have one of the suffixes, sorted by path.

    A link that leads nowhere is among them: reading it names it, and leaving it out would not.
    Hidden files and folders are not, such as macOS's ._photo.jpg and .ipynb_checkpoints.

    Raises:
        InputError: The folder, or one below it, cannot be read, or no file has such a suffix.
    """
    if not folder.is_dir():
        what = "a folder is wanted, not the file" if folder.is_file() else "folder not found:"
        raise InputError(f"{what} {folder}")
    try:
        entries = [*(files_below(folder) if recursive else folder.iterdir())]
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"cannot read the folder {where}: {error.strerror}") from error
    files = sorted(
        p
        for p in entries
        if p.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and (p.is_file() or not p.exists())
    )
    if not files:
        raise InputError(f"no file in {folder} ends in one of {', '.join(sorted(suffixes))}")
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder and in those below it, also in those that links lead to.

    Raises:
        OSError: A folder cannot be read; Path.rglob would pass over it.
    """

    def refuse(error: OSError) -> None:
        raise error

    above = {str(folder): [folder.resolve()]}  # by folder that is yet to come
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        yield from (Path(where, name) for name in names)
        passed = above.pop(where)
        for name in list(folders):
            path = os.path.join(where, name)  # noqa: PTH118 - as os.walk will spell it
            real = Path(path).resolve()
            if real in passed:  # a link back up, which would go round for ever
                folders.remove(name)
            else:
                above[path] = [*passed, real]


def pair_by_stem(image_dir: Path, mask_dir: Path) -> list[Pair]:
    """Returns the (image, mask) files of two folders whose names agree up to the ending, sorted.

    Raises:
        InputError: A folder is missing or empty, a stem occurs twice, or a file has no partner.
    """
    images = _by_stem(list_files(image_dir, IMAGE_SUFFIXES))
    masks = _by_stem(list_files(mask_dir, MASK_SUFFIXES))
    for have, lack, what, where in (
        (images, masks, "mask", mask_dir),
        (masks, images, "image", image_dir),
    ):
        alone = [str(path) for stem, path in have.items() if stem not in lack]
        if alone:
            raise InputError(
                f"{len(alone)} of {len(have)} files have no {what} of the same name in {where}: "
                f"{few(alone)}"
            )
    return [(path, masks[stem]) for stem, path in images.items()]


def pair_listed(names: Sequence[str], image_dir: Path, mask_dir: Path) -> list[Pair]:
    """Returns the (image, mask) files of two folders that have the names, in their order.

    Args:
        names: With the ending of an image or mask, or without; files of other names need no
            partner.
        image_dir: Folder of the images.
        mask_dir: Folder of the masks.

    Raises:
        InputError: A folder is missing or empty, a stem occurs twice in it, or a name is listed
            twice, has no file, or has a folder in it.
    """
    paths = [name for name in names if "/" in name or "\\" in name]
    if paths:
        raise InputError(
            f"names of files are wanted, of images in {image_dir} and masks in {mask_dir}, without "
            f"folders: {few(paths)}"
        )
    images = _by_stem(list_files(image_dir, IMAGE_SUFFIXES))
    masks = _by_stem(list_files(mask_dir, MASK_SUFFIXES))
    endings = IMAGE_SUFFIXES | MASK_SUFFIXES
    stems = [
        path.stem if (path := Path(name)).suffix.lower() in endings and name not in images else name
        for name in names
    ]
    for files, folder in ((images, image_dir), (masks, mask_dir)):
        absent = [name for name, stem in zip(names, stems, strict=True) if stem not in files]
        if absent:
            raise InputError(
                f"{len(absent)} of {len(names)} names have no file in {folder}: {few(absent)}"
            )
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise InputError(f"listed more than once: {few(twice)}")
    return [(images[stem], masks[stem]) for stem in stems]


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file that are not blank, without the space around them.

    Raises:
        InputError: It is missing or no UTF-8.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"file not found: {path}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason}): save it as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def _by_stem(files: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            raise InputError(f"two files for one name: {found[path.stem]} and {path}; remove one")
        found[path.stem] = path
    return found


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the opened file, pixels not yet decoded.

    Args:
        path: The file.
        max_pixels: Refuse an image of more.

    Raises:
        InputError: The file is missing, empty, no image, or too large.
    """
    try:
        with _pixel_limit(max_pixels):
            return Image.open(path)
    except FileNotFoundError as error:
        raise InputError(f"file not found: {path}") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"cannot read {path}: it has more than {max_pixels} pixels; cut it into tiles (predict "
            "takes --data.max_pixels, where memory allows)"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:  # from the system, not from Pillow
            reason = error.strerror
        elif path.stat().st_size == 0:
            reason = "the file is empty"
        else:
            reason = (
                "it is no image, or is damaged, or of a kind that Pillow does not know (convert it)"
            )
        raise InputError(f"cannot read {path}: {reason}; restore or remove it") from error


@contextlib.contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Sets Pillow's guard against files that unpack to more than the memory can hold."""
    before = Image.MAX_IMAGE_PIXELS
    # Pillow warns beyond its limit, and refuses beyond twice as much.
    Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def displayed_size(path: Path) -> tuple[int, int]:
    """Returns (H, W) as a viewer shows the file; reads its header only.

    Raises:
        InputError: The file cannot be read.
    """
    with open_image(path) as image:
        width, height = image.size
        # Not getexif(), which decodes a whole PNG. Pillow turns the size of a TIFF by itself.
        exif = Image.Exif()
        if image.format != "TIFF":
            with contextlib.suppress(*MEANINGLESS):
                exif.load(image.info.get("exif", b""))
        sideways = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if sideways else (height, width)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Returns the RGB image as uint8 (3, H, W), whatever the file's colour mode.

    An EXIF orientation is applied: viewers and labelling tools show the image that way up, so its
    mask was drawn for it.

    Args:
        path: The file.
        max_pixels: Refuse an image of more.

    Raises:
        InputError: The file cannot be read, is truncated, too large, or holds no brightness.
    """
    with open_image(path, max_pixels) as image:
        _decode(image, path)
        try:
            return rgb_pixels(image)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error


def read_top(path: Path, rows: int, size: Sequence[int]) -> Tensor | None:
    """Returns the first rows of a PNG, uint8 (3, rows, W); None for what `read_image` must read.

    A PNG is unpacked from its top, which takes most of the time that a training sample costs, and
    a crop does not need what is below it. Other formats, interlaced files, files with an EXIF
    orientation and rare colour modes are left to `read_image`.

    Args:
        path: The file.
        rows: How many.
        size: (H, W) that the image must have, or the result is None.

    Raises:
        InputError: The file cannot be read, or is truncated.
    """
    with open_image(path) as image:
        if (
            not isinstance(image, PngImageFile)
            or image.mode not in ("RGB", "L")
            or (image.height, image.width) != tuple(size)
            or image.info.get("interlace")
            or len(image.tile) != 1
        ):
            return None
        # Pillow is told that the image ends there: its decoder stops with the last row that the
        # tile covers, and goes on to read, but not to unpack, the rest of the file.
        codec, _, offset, arguments = image.tile[0]
        image.tile = [(codec, (0, 0, image.width, rows), offset, arguments)]  # type: ignore[list-item]
        image._size = (image.width, rows)
        _load(image, path)
        with contextlib.suppress(*MEANINGLESS):
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return None
        return rgb_pixels(image)


def read_mask(path: Path) -> Codes:
    """Returns the codes of an index mask, (H, W): palette indices or grey values, as stored.

    Raises:
        InputError: The file cannot be read, is truncated, or is no index mask.
    """
    with open_image(path) as image:
        if image.mode not in {"P", "L", "1", "I", "I;16", "I;16B"}:
            raise InputError(
                f"{path} is an {image.mode} image, but a mask must hold one class index per pixel "
                "(palette or greyscale); map its colours to indices first, or give them to a "
                "SegmentationFolder in classes.txt, as `road 128 64 128`"
            )
        tiles = getattr(image, "tile", [])
        stored_as = str(tiles[0][3]) if tiles else ""
        _decode(image, path)
        codes = np.array(image)
    for rawmode, step in (("L;2", 85), ("L;4", 17)):
        if rawmode in stored_as:  # Pillow stretches grey values of 2 and 4 bits to 0..255
            codes = codes // step
    return codes.astype(np.uint8) if codes.dtype in (np.uint8, np.bool_) else codes.astype(np.int64)


def _decode(image: Image.Image, path: Path) -> None:
    """Decodes an opened file in place and turns it the way up that its EXIF orientation says."""
    _load(image, path)
    with contextlib.suppress(*MEANINGLESS):
        ImageOps.exif_transpose(image, in_place=True)


def _load(image: Image.Image, path: Path) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of all kinds
        raise InputError(f"cannot read {path}: {error}; restore or remove it") from error


def map_codes(
    codes: Codes,
    table: npt.NDArray[np.uint8],
    num_classes: int,
    path: Path,
) -> Tensor:
    """Returns the class map uint8 (H, W) of a mask's codes: 0..K-1, or 255 to ignore.

    Args:
        codes: (H, W) as `read_mask` returns them.
        table: (256,) the class of each code, INVALID where it has none.
        num_classes: K, for the message.
        path: The mask's file, for the message.

    Raises:
        InputError: A code has no class.
    """
    if codes.dtype != np.uint8:
        wide = codes[(codes < 0) | (codes > 255)]
        if wide.size:
            raise InputError(_wrong_code(path, np.unique(wide), num_classes))
        codes = codes.astype(np.uint8)
    classes = table[codes]
    wrong = classes == INVALID
    if wrong.any():
        raise InputError(_wrong_code(path, np.unique(codes[wrong]), num_classes))
    return torch.from_numpy(classes)


def _wrong_code(path: Path, codes: npt.NDArray[np.int64], num_classes: int) -> str:
    values = few([str(code) for code in codes])
    return (
        f"{path} holds the value {values}, which is neither one of the {num_classes} classes nor "
        "255 (ignore); correct the mask, the class names, or give a label_map"
    )
