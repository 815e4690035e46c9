"""Anybody's images and masks in folders."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.files import IGNORE, Pair, pair_by_stem, pair_listed, read_lines
from isanet_pl.data.palette import Colour, ColourMasks, default_palette
from isanet_pl.errors import InputError, few

CLASSES = "classes.txt"
WITH_COLOUR = re.compile(r"(.*[^\s,])[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})")


class SegmentationFolder(SegmentationDataModule):
    """Your own data: `root/{train,val,test}/{images,masks}/NAME.EXT`, paired by name.

    Or all files in `root/{images,masks}`, and in `root/{train,val,test}.txt` the names of each
    split's, one a line, with their ending or without; a list of a split that has a folder is not
    read.

    Masks are index images (palette or greyscale PNG): 0..K-1 for the classes, 255 to ignore. Other
    codes are translated by `label_map` or `reduce_zero_label`. Class names come from the argument
    or from `root/classes.txt`, one a line.

    Where each line of `classes.txt` ends in a colour, as `road 128 64 128`, masks in colours (RGB
    or palette images, and greyscale ones if a class is grey) are read by these, and predictions
    are drawn in them. Lines of the name `ignore` give the colours of pixels that do not count.

    Args:
        root: The folder.
        class_names: Names of the classes 0..K-1; None: read `root/classes.txt`.
        label_map: Class (or 255) of each code in the mask files; codes not listed are errors.
            None: codes are classes.
        reduce_zero_label: Code 0 means ignore and code i class i - 1 (as in ADE20K).
        kwargs: See `SegmentationDataModule`.

    Raises:
        InputError: There are no class names, or fewer than two, or `classes.txt` is wrong.
    """

    def __init__(
        self,
        root: str | None = None,
        class_names: Sequence[str] | None = None,
        label_map: dict[int, int] | None = None,
        reduce_zero_label: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.label_map = label_map
        self.reduce_zero_label = reduce_zero_label
        colours: list[Colour] = []
        if class_names is None:
            class_names, colours = read_classes(self.root_path / CLASSES)
        elif (
            root is not None
            and Path(root, CLASSES).is_file()
            and read_classes(Path(root, CLASSES))[1]
        ):
            raise InputError(
                f"{Path(root, CLASSES)} gives colours and names: leave out --data.class_names"
            )
        if colours:
            class_names, colours = self._read_by_colour(class_names, colours)
        self.class_names = list(class_names)
        if len(self.class_names) < 2:
            raise InputError(f"at least two classes are needed, got {self.class_names}")
        if len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"a class name occurs twice: {self.class_names}")
        self.palette = colours or default_palette(len(self.class_names))

    def _read_by_colour(
        self, names: Sequence[str], colours: Sequence[Colour]
    ) -> tuple[list[str], list[Colour]]:
        """Lets masks be read by the colours of `classes.txt`; returns those of the classes."""
        if self.label_map is not None or self.reduce_zero_label:
            raise InputError(
                f"{self.root_path / CLASSES} gives colours, which say the class: leave out "
                "--data.label_map and --data.reduce_zero_label"
            )
        entries = list(zip(names, colours, strict=True))
        classes = [(name, colour) for name, colour in entries if name != "ignore"]
        numbers = {colour: number for number, (_, colour) in enumerate(classes)}
        ignored = {colour: IGNORE for name, colour in entries if name == "ignore"}
        self.read_codes = ColourMasks({**numbers, **ignored})
        return [name for name, _ in classes], [colour for _, colour in classes]

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split, of its folder or else of its list.

        Raises:
            InputError: There is neither, a file has no partner, or a listed one is missing.
        """
        root = self.root_path
        folder, listed = root / split, root / f"{split}.txt"
        if os.path.lexists(folder):  # also a link that leads nowhere, to be named
            return pair_by_stem(folder / "images", folder / "masks")
        if not listed.is_file():
            raise InputError(
                f"{split} split not found: neither {folder / 'images'}, with the folder masks "
                f"beside it, nor {listed}, a list of names in {root / 'images'}"
            )
        names = read_lines(listed)
        if not names:
            raise InputError(f"{listed} lists nothing: write the name of an image in each line")
        try:
            return pair_listed(names, root / "images", root / "masks")
        except InputError as error:
            raise InputError(f"{listed}: {error}") from error


def read_classes(path: Path) -> tuple[list[str], list[Colour]]:
    """Returns the names of a `classes.txt`, and the colour of each; no colours if it has none.

    Raises:
        InputError: It is missing, no UTF-8, or some of its colours are missing or wrong.
    """
    if not path.is_file():
        raise InputError(
            f"class names are missing: give --data.class_names '[a, b]' or write {path}, one "
            "name a line in the order of the mask codes"
        )
    lines = read_lines(path)
    found = [WITH_COLOUR.fullmatch(line) for line in lines]
    coloured = [match for match in found if match]
    if not coloured:
        return lines, []
    if len(coloured) < len(lines):
        without = [line for line, match in zip(lines, found, strict=True) if not match]
        raise InputError(
            f"{path}: some lines end in a colour, as `road 128 64 128`, but not {few(without)}"
        )
    colours = [(int(m[2]), int(m[3]), int(m[4])) for m in coloured]
    wrong = [str(c) for c, n in Counter(colours).items() if n > 1 or max(c) > 255]
    if wrong:
        raise InputError(
            f"{path}: each colour must stand on one line only, with numbers up to 255: {few(wrong)}"
        )
    return [m[1] for m in coloured], colours
