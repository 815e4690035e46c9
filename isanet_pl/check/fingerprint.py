"""The fingerprint of a data set: sizes, colours, classes and findings, and as JSON."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isanet_pl.check.facts import Files, Outside, Pixels, SplitFacts, count_classes
from isanet_pl.data.files import IGNORE
from isanet_pl.data.palette import Colour


@dataclass(frozen=True)
class SplitFingerprint:
    """The facts of a whole split.

    Attributes:
        num_pairs: How many pairs.
        documented: How many there should be; None: nobody says.
        sizes: (H, W, images) of each size, by its pixels.
        mean: Of R, G and B over all pixels, 0..255; None: no image can be read.
        std: The same.
        brightest: The highest value of any channel.
        class_pixels: Of each of the K classes.
        class_images: Images that hold each class.
        ignored_pixels: Pixels of 255, or of codes that are translated to it.
        outside_pixels: Pixels of codes without a class.
        codes: Pixels of each code 0..255 in the mask files, those that occur.
        outside: The codes without a class.
        files: What was noted about files; see `isanet_pl.check.facts.read_pairs`.
        largest: (image, mask) with the most pixels of each class; None: it occurs in none.
        redrawn: Codes that masks with palettes show in several colours: code, one colour and a
            mask that has it, another colour and a mask.
        num_masks: Masks that differ from each other.
    """

    num_pairs: int
    documented: int | None
    sizes: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    brightest: int
    class_pixels: tuple[int, ...]
    class_images: tuple[int, ...]
    ignored_pixels: int
    outside_pixels: int
    codes: dict[int, int]
    outside: dict[int, Outside]
    files: dict[str, Files]
    largest: tuple[tuple[str, str] | None, ...]
    redrawn: tuple[tuple[int, Colour, str, Colour, str], ...]
    num_masks: int

    @property
    def pixels(self) -> int:
        """Returns the pixels of all masks."""
        return sum(self.class_pixels) + self.ignored_pixels + self.outside_pixels

    @property
    def shares(self) -> list[float]:
        """Returns the share of each class in the pixels that have one."""
        total = max(1, sum(self.class_pixels))
        return [count / total for count in self.class_pixels]

    @property
    def ignored_share(self) -> float:
        """Returns the share of ignored pixels in all pixels."""
        return self.ignored_pixels / max(1, self.pixels)

    def size_at(self, quantile: float) -> tuple[int, int]:
        """Returns (H, W) of the image at a quantile, images sorted by their pixels.

        Raises:
            IndexError: No image can be read.
        """
        rank = quantile * (sum(images for *_, images in self.sizes) - 1)
        for height, width, images in self.sizes:
            rank -= images
            if rank < 0:
                return height, width
        return self.sizes[-1][:2]


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a data set.

    Attributes:
        data: Name of its class.
        root: Its folder.
        class_names: K names.
        splits: By name.
        duplicates: Images that several files decode to, by the splits that these are in ("train",
            "train and val"); "conflict" are those of one split whose masks differ.
    """

    data: str
    root: str
    class_names: tuple[str, ...]
    splits: dict[str, SplitFingerprint]
    duplicates: dict[str, Files]

    def to_json(self, **more: Any) -> str:
        """Returns the fingerprint, and other things beside it, as JSON."""
        return json.dumps({**asdict(self), **more}, indent=1) + "\n"


def summarise(
    facts: SplitFacts, table: Pixels, num_classes: int, documented: int | None
) -> SplitFingerprint:
    """Returns the fingerprint of a split whose pairs have all been added.

    Args:
        facts: Those of all pairs.
        table: (256,) class of each code.
        num_classes: K.
        documented: How many pairs there should be, if anybody says.
    """
    by_class = count_classes(facts.codes, table)
    values = np.flatnonzero(facts.colours.sum(axis=0))
    mean, std = _moments(facts) if values.size else (None, None)
    pairs = [facts.largest.get(index) for index in range(num_classes)]
    return SplitFingerprint(
        num_pairs=facts.num_pairs,
        documented=documented,
        sizes=tuple(sorted(((*s, n) for s, n in facts.sizes.items()), key=_by_pixels)),
        mean=mean,
        std=std,
        brightest=int(values[-1]) if values.size else 0,
        class_pixels=tuple(by_class[:num_classes].tolist()),
        class_images=tuple(facts.class_images[:num_classes].tolist()),
        ignored_pixels=int(by_class[IGNORE]),
        outside_pixels=facts.outside_pixels,
        codes={int(code): int(facts.codes[code]) for code in np.flatnonzero(facts.codes)},
        outside=facts.outside,
        files=facts.files,
        largest=tuple(pair and pair[1:] for pair in pairs),
        redrawn=tuple(
            (code, *first, *second)
            for code, (first, *others) in sorted((c, d.items()) for c, d in facts.drawn.items())
            for second in others
        ),
        num_masks=len({mask for *_, mask in facts.digests}),
    )


def _by_pixels(size: tuple[int, int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]


def _moments(facts: SplitFacts) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel, exact up to the last division."""
    means, deviations = [], []
    for counts in facts.colours.tolist():
        total = sum(counts)
        first = sum(value * count for value, count in enumerate(counts))
        second = sum(value * value * count for value, count in enumerate(counts))
        means.append(first / total)
        deviations.append(math.sqrt(total * second - first * first) / total)
    return tuple(means), tuple(deviations)


def find_duplicates(splits: Mapping[str, SplitFacts]) -> dict[str, Files]:
    """Returns the images that occur more than once; see `Fingerprint.duplicates`."""
    times = Counter(image for facts in splits.values() for _, image, _ in facts.digests)
    groups: dict[bytes, list[tuple[str, str, bytes]]] = defaultdict(list)
    for split, facts in splits.items():
        for name, image, mask in facts.digests:
            if times[image] > 1:
                groups[image].append((split, name, mask))
    found: dict[str, Files] = {}
    for group in groups.values():
        within = list(dict.fromkeys(split for split, *_ in group))
        # The first of each split, then the others: who reads the first few sees what is wrong.
        first = {split: min(n for s, n, _ in group if s == split) for split in within}
        rest = sorted({name for _, name, _ in group}.difference(first.values()))
        # One file that two lists have is one name.
        names = list(dict.fromkeys([*first.values(), *rest]))
        text = " = ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        kinds = [" and ".join(within)]
        if len(within) == 1 and len({mask for *_, mask in group}) > 1:
            kinds.append("conflict")
        for kind in kinds:
            found[kind] = found.get(kind, Files()) + Files(1, (text,))
    return found
