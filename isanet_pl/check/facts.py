"""What image and mask files hold, counted pair by pair in bounded memory."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from isanet_pl.data.files import (
    IGNORE,
    INVALID,
    Codes,
    Pair,
    open_image,
    read_image,
    read_mask,
)
from isanet_pl.data.palette import Colour
from isanet_pl.errors import InputError

Counts = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

FILES_KEPT = 100
"""Files that are named for each finding; further ones are only counted."""
CODES_KEPT = 50
"""Codes without a class that are told apart; further ones, the highest, are only counted."""


@dataclass(frozen=True)
class Files:
    """How many files something is true of, and the first of them by name."""

    count: int = 0
    first: tuple[str, ...] = ()

    def __add__(self, other: "Files") -> "Files":
        names = sorted(self.first + other.first)[:FILES_KEPT]
        return Files(self.count + other.count, tuple(names))


@dataclass(frozen=True)
class Outside:
    """A code that is neither a class nor ignored: its pixels, and the masks that hold it."""

    pixels: int
    masks: Files

    def __add__(self, other: "Outside") -> "Outside":
        return Outside(self.pixels + other.pixels, self.masks + other.masks)


@dataclass
class SplitFacts:
    """Facts of some pairs, one or a million. `add` is associative: any grouping gives the same.

    Attributes:
        num_pairs: How many pairs.
        sizes: Images of each (H, W).
        colours: (3, 256) image pixels of each value of R, G and B.
        codes: (256,) mask pixels of each code.
        class_images: (256,) masks that hold each class, or ignored pixels (255).
        outside: The codes without a class; the lowest ones if there are many.
        outside_pixels: Pixels of all codes without a class.
        files: What was noted about files, by kind; see `read_pairs`.
        largest: The pair with the most pixels of each class: minus the pixels, image, mask.
        drawn: For each code with a class the colours that masks with a palette show it in, the two
            lowest, with the first mask of each.
        digests: Name of each image, with the digests of what image and mask decode to. The only
            thing that grows with the number of pairs, by some 300 bytes each.
    """

    num_pairs: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    colours: Counts = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    codes: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    class_images: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    outside: dict[int, Outside] = field(default_factory=dict)
    outside_pixels: int = 0
    files: dict[str, Files] = field(default_factory=dict)
    largest: dict[int, tuple[int, str, str]] = field(default_factory=dict)
    drawn: dict[int, dict[Colour, str]] = field(default_factory=dict)
    digests: list[tuple[str, bytes, bytes]] = field(default_factory=list)

    def add(self, other: "SplitFacts") -> None:
        """Adds the facts of other pairs."""
        self.num_pairs += other.num_pairs
        self.sizes.update(other.sizes)
        self.colours += other.colours
        self.codes += other.codes
        self.class_images += other.class_images
        for code, found in other.outside.items():
            self.outside[code] = self.outside[code] + found if code in self.outside else found
        # A code among the lowest of all is among the lowest of every part: no count is lost.
        self.outside = {code: self.outside[code] for code in sorted(self.outside)[:CODES_KEPT]}
        self.outside_pixels += other.outside_pixels
        for kind, files in other.files.items():
            self.files[kind] = self.files.get(kind, Files()) + files
        for index, pair in other.largest.items():
            self.largest[index] = min(self.largest.get(index, pair), pair)
        for code, colours in other.drawn.items():
            known = dict(self.drawn.get(code, {}))
            for colour, mask in colours.items():
                known[colour] = min(known.get(colour, mask), mask)
            self.drawn[code] = dict(sorted(known.items())[:2])
        self.digests += other.digests

    def note(self, kind: str, text: str) -> None:
        """Notes that something is true of one more file."""
        self.files[kind] = self.files.get(kind, Files()) + Files(1, (text,))


def read_pairs(
    pairs: Iterable[Pair], table: Pixels, read_codes: Callable[[Path], Codes]
) -> SplitFacts:
    """Returns the facts of some pairs.

    What can be wrong with a file is a fact too, noted under `unreadable` (with the message),
    `sizes` (of image and mask differ), `outside` (codes without a class), `ignored` (the whole
    mask), `jpeg` (a mask that is one), `plain` (an image of one colour) or `copy` (the mask is the
    image).

    Args:
        pairs: The files.
        table: (256,) class of each code; see `isanet_pl.data.dataset.code_table`.
        read_codes: Returns the codes (H, W) of a mask file.
    """
    facts = SplitFacts()
    for pair in pairs:
        facts.add(_read_pair(pair, table, read_codes))
    return facts


def _read_pair(pair: Pair, table: Pixels, read_codes: Callable[[Path], Codes]) -> SplitFacts:
    image, mask = map(str, pair)
    facts = SplitFacts(num_pairs=1)
    pixels = _try(_read_pixels, pair[0], facts)
    codes = _try(read_codes, pair[1], facts)
    if pixels is not None:
        _count_pixels(pixels, facts, image)
    if codes is not None:
        _count_codes(codes, table, facts, image, mask)
        if _is_jpeg(pair[1]):
            facts.note("jpeg", mask)
        if read_codes is read_mask:
            used = np.flatnonzero((facts.codes > 0) & (table < INVALID)).tolist()
            facts.drawn = {c: {colour: mask} for c, colour in _palette(pair[1], used).items()}
    if pixels is not None and codes is not None:
        facts.digests.append((image, _digest(pixels), _digest(codes)))
        if pixels.shape[:2] != codes.shape:
            (h, w), (mask_h, mask_w) = pixels.shape[:2], codes.shape
            facts.note("sizes", f"{image} is {w}x{h}, its mask {mask} {mask_w}x{mask_h}")
        elif _is_copy(pixels, codes, facts):
            facts.note("copy", mask)
    return facts


def _try(reader: Callable[[Path], T], path: Path, facts: SplitFacts) -> T | None:
    try:
        return reader(path)
    except InputError as error:
        facts.note("unreadable", str(error))
    except Exception as error:  # decoders raise what they like on a broken file
        facts.note("unreadable", f"cannot read {path}: {type(error).__name__}: {error}")
    return None


def _read_pixels(path: Path) -> Pixels:
    """Returns the RGB image (H, W, 3)."""
    pixels: Pixels = read_image(path).permute(1, 2, 0).contiguous().numpy()
    return pixels


def _count_pixels(pixels: Pixels, facts: SplitFacts, image: str) -> None:
    facts.sizes[pixels.shape[0], pixels.shape[1]] += 1
    facts.colours += _histogram(pixels).reshape(3, 256)
    if np.count_nonzero(facts.colours) == 3:
        facts.note("plain", image)


def _count_codes(codes: Codes, table: Pixels, facts: SplitFacts, image: str, mask: str) -> None:
    outside: dict[int, int] = {}
    if codes.dtype == np.uint8:
        facts.codes += _histogram(codes.astype(np.uint8, copy=False))
    else:
        wide = (codes < 0) | (codes > 255)
        values, counts = np.unique(codes[wide], return_counts=True)
        outside.update(zip(values.tolist(), counts.tolist(), strict=True))
        facts.codes += np.bincount(codes[~wide], minlength=256)
    by_class = count_classes(facts.codes, table)
    for index in np.flatnonzero(by_class).tolist():
        facts.class_images[index] = 1
        facts.largest[index] = (-int(by_class[index]), image, mask)
    narrow = np.flatnonzero((table == INVALID) & (facts.codes > 0))
    outside.update(zip(narrow.tolist(), facts.codes[narrow].tolist(), strict=True))
    facts.outside = {
        c: Outside(outside[c], Files(1, (mask,))) for c in sorted(outside)[:CODES_KEPT]
    }
    facts.outside_pixels = sum(outside.values())
    if outside:
        facts.note("outside", mask)
    if by_class[IGNORE] == codes.size:
        facts.note("ignored", mask)


def count_classes(codes: Counts, table: Pixels) -> Counts:
    """Returns the pixels (256,) of each class, of INVALID and of 255, from those of each code."""
    pixels = np.zeros(256, np.int64)
    np.add.at(pixels, table, codes)
    return pixels


def _histogram(pixels: Pixels) -> Counts:
    """Returns how often each value occurs (256,), for an RGB image in each channel (768,)."""
    # Pillow's takes a quarter of the time of np.bincount, which first widens to 8 bytes a pixel.
    return np.array(Image.fromarray(pixels).histogram(), np.int64)


def _digest(array: npt.NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=12)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _is_jpeg(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == b"\xff\xd8\xff"


def _palette(path: Path, codes: Iterable[int]) -> dict[int, Colour]:
    """Returns the colours that a PNG with a palette shows codes in; nothing for other files."""
    with open_image(path) as image:
        # Not getpalette(), which decodes the file once more.
        kind, parts = image.palette.getdata() if image.palette else ("", b"")
    if kind != "RGB":
        return {}
    colours = list(zip(parts[::3], parts[1::3], parts[2::3], strict=False))
    return {code: colours[code] for code in codes if code < len(colours)}


def _is_copy(pixels: Pixels, codes: Codes, facts: SplitFacts) -> bool:
    """Returns whether a mask of several codes is the image itself."""
    # The histograms, which are there anyway, tell nearly all apart.
    return bool(
        np.count_nonzero(facts.codes) > 1
        and np.array_equal(facts.colours[0], facts.codes)
        and np.array_equal(pixels[..., 0], codes)
    )
