"""Anybody's images and masks in folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isanet_pl.data.datamodule import SegmentationDataModule, Split
from isanet_pl.data.dataset import default_palette
from isanet_pl.data.files import Pair, pair_by_stem
from isanet_pl.errors import InputError


class SegmentationFolder(SegmentationDataModule):
    """Your own data: `root/{train,val,test}/{images,masks}/NAME.EXT`, paired by name.

    Masks are index images (palette or greyscale PNG): 0..K-1 for the classes, 255 to ignore. Other
    codes are translated by `label_map` or `reduce_zero_label`. Class names come from the argument
    or from `root/classes.txt`, one a line.

    Args:
        root: The folder.
        class_names: Names of the classes 0..K-1; None: read `root/classes.txt`.
        label_map: Class (or 255) of each code in the mask files; codes not listed are errors.
            None: codes are classes.
        reduce_zero_label: Code 0 means ignore and code i class i - 1 (as in ADE20K).
        kwargs: See `SegmentationDataModule`.

    Raises:
        InputError: There are no class names, or fewer than two.
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
        self.class_names = self._read_names() if class_names is None else list(class_names)
        if len(self.class_names) < 2:
            raise InputError(f"at least two classes are needed, got {list(self.class_names)}")
        if len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"a class name occurs twice: {list(self.class_names)}")
        self.palette = default_palette(len(self.class_names))
        self.label_map = label_map
        self.reduce_zero_label = reduce_zero_label

    def _read_names(self) -> list[str]:
        path: Path = self.root_path / "classes.txt"
        if not path.is_file():
            raise InputError(
                f"class names are missing: give --data.class_names '[a, b]' or write {path}, one "
                "name a line in the order of the mask codes"
            )
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is no UTF-8 text ({error.reason}): save it as UTF-8"
            ) from error
        return [line.strip() for line in lines if line.strip()]

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split."""
        folder = self.root_path / split
        return pair_by_stem(folder / "images", folder / "masks")
