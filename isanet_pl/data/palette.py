"""Colours of classes: the usual ones, and masks whose colours are the labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isanet_pl.data.files import INVALID, Codes, open_image, read_image, read_mask
from isanet_pl.errors import InputError, few

Colour = tuple[int, int, int]
"""RGB 0..255."""


def default_palette(num_classes: int) -> tuple[Colour, ...]:
    """Returns PASCAL VOC's colour map: the bits of the class index spread over R, G and B."""
    palette = []
    for index in range(num_classes):
        colour, code = [0, 0, 0], index
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= (code >> channel & 1) << bit
            code >>= 3
        palette.append((colour[0], colour[1], colour[2]))
    return tuple(palette)


@dataclass(frozen=True)
class ColourMasks:
    """Reads masks by their colours; a data module's `read_codes`.

    Attributes:
        classes: Class 0..K-1, or 255 to ignore, of each colour.
    """

    classes: Mapping[Colour, int]

    def __call__(self, path: Path) -> Codes:
        """Returns the class of each pixel, (H, W).

        Of a palette file the colours count, not the indices: programs that save few colours with
        a palette of their own number them anew in each file. A greyscale file is read by its
        colours where a class has a grey one, as black is; else its values are the classes.

        Raises:
            InputError: The file cannot be read, is truncated, or has a colour without a class.
        """
        with open_image(path) as image:
            mode = image.mode
        if mode not in ("RGB", "RGBA", "P") and not (self._has_grey and mode in ("L", "LA", "1")):
            return read_mask(path)
        red, green, blue = read_image(path).numpy().astype(np.uint32)
        packed = red << 16 | green << 8 | blue
        codes: Codes = self._table[packed]
        if (codes == INVALID).any():
            wrong = [_unpack(int(c)) for c in np.unique(packed[codes == INVALID])]
            raise InputError(
                f"{path} has pixels of the colour {few([str(c) for c in wrong])}, which is no "
                "class's: give it a line in classes.txt, of a class or of `ignore`; colours "
                "between those of classes come from smooth edges or JPEG: export PNG without them"
            )
        return codes

    @property
    def _has_grey(self) -> bool:
        return any(red == green == blue for red, green, blue in self.classes)

    @cached_property
    def _table(self) -> npt.NDArray[np.uint8]:
        table = np.full(1 << 24, INVALID, dtype=np.uint8)  # 16 MB, and by far the fastest
        for (red, green, blue), index in self.classes.items():
            table[red << 16 | green << 8 | blue] = index
        return table


def _unpack(packed: int) -> Colour:
    return packed >> 16, packed >> 8 & 255, packed & 255
