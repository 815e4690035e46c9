"""Official archives as they unpack: finding their folders, lists of ids, MATLAB masks."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isanet_pl.data.files import Codes, Pair, read_lines
from isanet_pl.errors import InputError


def find_below(root: Path, *names: str, places: Sequence[str] = (".",), source: str) -> Path:
    """Returns the first of some files or folders that is there.

    Args:
        root: Where to look.
        names: What to look for, the official name first.
        places: Folders below `root` to look in.
        source: Where to get it, for the message.

    Raises:
        InputError: None of them is there.
    """
    paths = [root / place / name for name in names for place in places]
    for path in paths:
        if path.exists():
            return path
    others = ", ".join(str(path.relative_to(root)) for path in paths[1:])
    raise InputError(
        f"not found: {paths[0]}{f' (nor {others})' if others else ''}; get it from {source}"
    )


def read_ids(path: Path) -> list[str]:
    """Returns the ids that a text file lists, one a line.

    Raises:
        InputError: The file is missing, no UTF-8, or lists nothing.
    """
    ids = read_lines(path)
    if not ids:
        raise InputError(f"{path} lists nothing; restore it from the archive")
    return ids


def list_ids(folder: Path, ending: str) -> list[str]:
    """Returns the names of the files of a folder that have an ending, without it, sorted.

    Raises:
        InputError: The folder does not exist, or no file in it has the ending.
    """
    ids = sorted(n.removesuffix(ending) for n in _names(folder) if n.endswith(ending))
    if not ids:
        raise InputError(f"no file in {folder} ends in {ending}")
    return ids


def pair_ids(
    ids: Sequence[str], images: Path, masks: Path, image_ending: str, mask_ending: str
) -> list[Pair]:
    """Returns the (image, mask) files of some ids, in their order.

    Args:
        ids: Names without their ending.
        images: Folder of the images.
        masks: Folder of the masks; files of other ids in it are left alone.
        image_ending: What follows the id in the name of an image.
        mask_ending: What follows the id in the name of a mask.

    Raises:
        InputError: A folder or a file is missing.
    """
    for folder, ending in ((images, image_ending), (masks, mask_ending)):
        names = _names(folder)
        missing = [name for i in ids if (name := f"{i}{ending}") not in names]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(ids)} files are missing in {folder}, the first is "
                f"{missing[0]}; was the archive unpacked completely?"
            )
    return [(images / f"{i}{image_ending}", masks / f"{i}{mask_ending}") for i in ids]


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise InputError(f"folder not found: {folder}")
    with os.scandir(folder) as entries:  # quicker than iterdir: COCO has 118,287 files in a folder
        # Hidden files are of the system, such as macOS's ._NAME beside each NAME.
        return {entry.name for entry in entries if not entry.name.startswith(".")}


def read_mat(path: Path, variable: str, field: str | None = None) -> Codes:
    """Returns the codes (H, W) that a MATLAB file holds.

    Args:
        path: The .mat file.
        variable: Name of the matrix, or of the structure that has it.
        field: Name of the matrix in the structure.

    Raises:
        InputError: The file is missing or damaged, or has no such matrix.
    """
    from scipy.io import loadmat  # slow to import, and few data sets need it

    if not path.is_file():
        raise InputError(f"file not found: {path}")
    try:
        content: dict[str, Any] = loadmat(path, appendmat=False, variable_names=[variable])
    except Exception as error:  # scipy raises many kinds on a damaged file, none documented
        raise InputError(f"cannot read {path}: {error}; restore or remove it") from error
    codes = content.get(variable)
    if codes is not None and field is not None:
        codes = codes[field][0, 0] if field in (codes.dtype.names or ()) else None
    if codes is None or codes.ndim != 2 or codes.dtype.kind not in "uif":
        wanted = variable if field is None else f"{variable}.{field}"
        raise InputError(f"{path} holds no matrix {wanted}; is it a file of this data set?")
    wide: Codes = codes if codes.dtype == np.uint8 else codes.astype(np.int64)
    return wide
