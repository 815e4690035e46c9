"""Samples of files: image and class map, read, mapped and checked."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from isanet_pl.data.cache import DecodedCache
from isanet_pl.data.colours import Jitter, draw_jitter
from isanet_pl.data.files import (
    IGNORE,
    IMAGE_SUFFIXES,
    INVALID,
    MASK_SUFFIXES,
    MAX_PIXELS,
    Codes,
    Pair,
    displayed_size,
    files_below,
    list_files,
    map_codes,
    read_image,
    read_mask,
    read_top,
)
from isanet_pl.data.transforms import TrainTransform, Window
from isanet_pl.errors import InputError

log = logging.getLogger(__name__)

CodeTable = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Sample(TypedDict, total=False):
    """One image, or a batch of them with a leading axis N; prediction samples have no mask."""

    image: Tensor  # uint8 (3, H, W) RGB
    mask: Tensor  # uint8 (H, W), classes 0..K-1, 255 = ignore
    name: str  # the file, for messages and for naming results
    error: str  # why there is no image; prediction samples only
    jitter: Jitter  # how the device is to change the colours; training samples only
    replaced: list[str]  # why those could not be read that this one stands in for; as `jitter`


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns a batch: image uint8 (N, 3, H, W) channels_last, mask (N, H, W), lists of the rest.

    The samples must be of one kind: with masks or without, with images or without.

    Raises:
        InputError: The images have several sizes.
    """
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}  # type: ignore[literal-required]
    sizes = {tuple(image.shape[1:]) for image in batch.get("image", ())}
    if len(sizes) > 1:
        raise InputError(
            f"images of several sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))}) make no "
            "batch: set --data.eval_batch_size 1"
        )
    if "image" in batch:
        # Stacked as the files are decoded, colours last: a plain copy, and what convs want.
        pixels = default_collate([image.permute(1, 2, 0) for image in batch["image"]])
        batch["image"] = pixels.permute(0, 3, 1, 2)
    if "mask" in batch:
        batch["mask"] = default_collate(batch["mask"])
    return batch


def code_table(
    num_classes: int, label_map: dict[int, int] | None, reduce_zero_label: bool
) -> CodeTable:
    """Returns the class of each mask code, uint8 (256,), INVALID where it has none.

    Args:
        num_classes: K.
        label_map: Class (or 255) of each code in the file; codes not listed have none, except 255.
            None: codes are classes.
        reduce_zero_label: Code 0 means ignore, code i class i - 1. Applied before `label_map`.

    Raises:
        InputError: A code is outside 0..255, or a class outside 0..K-1 and not 255.
    """
    if num_classes > INVALID:
        raise InputError(f"at most {INVALID} classes fit into masks of 8 bits, got {num_classes}")
    if label_map is None:
        label_map = {i: i for i in range(num_classes)}
    for code, index in label_map.items():
        if not 0 <= code <= 255 or not (0 <= index < num_classes or index == IGNORE):
            raise InputError(
                f"label_map maps {code} to {index}; codes are 0..255, classes 0..{num_classes - 1} "
                "or 255 (ignore)"
            )
    table = np.full(256, INVALID, dtype=np.uint8)
    table[IGNORE] = IGNORE
    for code, index in label_map.items():
        table[code] = index
    if reduce_zero_label:
        table = np.concatenate([[np.uint8(IGNORE)], table[:-1]])
        table[IGNORE] = IGNORE
    return table


class PairDataset(Dataset[Sample]):
    """Samples of (image, mask) files.

    Args:
        pairs: The files.
        table: Class of each mask code; see `code_table`.
        num_classes: K, for messages.
        transform: What is made of them; None returns them as they are in the files.
        read_codes: Returns the codes (H, W) of a mask file.
        photometric: Draw a `jitter` with each sample, where there is a transform.
        cache: Where decoded samples are kept; None: nowhere.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        table: CodeTable,
        num_classes: int,
        transform: TrainTransform | None = None,
        read_codes: Callable[[Path], Codes] = read_mask,
        photometric: bool = False,
        cache: DecodedCache | None = None,
    ) -> None:
        self.pairs = pairs
        self.table = table
        self.num_classes = num_classes
        self.transform = transform
        self.read_codes = read_codes
        self.photometric = photometric
        self.cache = cache

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        if self.cache is not None:
            image, mask = self.cache.read(pair, lambda: self.decode(pair))
            window = self.transform.draw(mask) if self.transform else None
        else:
            mask = self._read_mask(pair)
            window = self.transform.draw(mask) if self.transform else None
            image = self._read_image(pair, mask, window)
        if self.transform is not None and window is not None:
            image, mask = self.transform.cut(image, mask, window)
        sample: Sample = {"image": image, "mask": mask, "name": str(pair[0])}
        if self.photometric and window is not None:
            height, width = window.out_height, window.out_width
            sample["jitter"] = draw_jitter()._replace(height=height, width=width)
        return sample

    def decode(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Returns image uint8 (3, H, W) and class map uint8 (H, W) of two files.

        Raises:
            InputError: A file cannot be read, the sizes differ, or a mask has a wrong code.
        """
        mask = self._read_mask(pair)
        return self._read_image(pair, mask), mask

    def _read_mask(self, pair: Pair) -> Tensor:
        return map_codes(self.read_codes(pair[1]), self.table, self.num_classes, pair[1])

    def _read_image(self, pair: Pair, mask: Tensor, window: Window | None = None) -> Tensor:
        """Returns the image of a mask; of a window, perhaps only the rows down to its last."""
        image_path, mask_path = pair
        if window is not None and window.top + window.height < len(mask):
            image = read_top(image_path, window.top + window.height, mask.shape)
            if image is not None:
                return image
        image = read_image(image_path)
        if image.shape[1:] != mask.shape:
            raise _size_error(image_path, mask_path, image.shape[1:], mask.shape)
        return image


class ImageDataset(Dataset[Sample]):
    """Samples without masks: every image below a folder, named by its path in it.

    The name leaves the file's ending out, unless that would give two files one name. A file that
    cannot be read gives a sample with `error` and no image.

    Args:
        folder: The folder.
        output: Folder of results, which are no input; images that have a mask in its `masks` are
            left out. None: there is none.
        max_pixels: Refuse images of more.

    Raises:
        InputError: The folder does not exist or holds no image, or is inside `output`.
    """

    def __init__(
        self,
        folder: Path,
        output: Path | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        found = list_files(folder, IMAGE_SUFFIXES, recursive=True)
        own = None if output is None else output.resolve()
        if own in (folder.resolve(), *folder.resolve().parents):
            raise InputError(
                f"--output {output} holds --data.predict_dir {folder}, so that its images would be "
                "taken for results: give another --output"
            )
        files = [p for p in found if own is None or own not in p.resolve().parents]
        paths = [path.relative_to(folder) for path in files]
        stems, known = Counter(path.with_suffix("") for path in paths), set(paths)
        names = [
            str(stem if stems[stem := path.with_suffix("")] == 1 and stem not in known else path)
            for path in paths
        ]
        self.files = [
            (path, name)
            for path, name in zip(files, names, strict=True)
            if output is None or not (output / "masks" / f"{name}.png").is_file()
        ]
        self.max_pixels = max_pixels
        others = Counter(
            path.suffix.lower() or path.name
            for path in files_below(folder)
            if path.suffix.lower() not in IMAGE_SUFFIXES
            and (own is None or own not in path.resolve().parents)
        )
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
            log.info("files in %s that are not read, for their endings: %s", folder, kinds)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, name = self.files[index]
        try:
            return {"image": read_image(path, self.max_pixels), "name": name}
        except Exception as error:  # whatever a damaged file makes Pillow do
            reason = str(error) if isinstance(error, InputError) else f"{path}: {error!r}"
            return {"name": name, "error": reason}


def check_pairs(dataset: PairDataset, headers: int = 500, samples: int = 8) -> None:
    """Reads an even sample of the files, so that what is wrong shows before the first step.

    Args:
        dataset: The samples to check.
        headers: Compare the sizes of at least this many pairs, if there are as many.
        samples: Decode at least this many samples, if there are as many.

    Raises:
        InputError: A file cannot be read, sizes of a pair differ, or a mask has a wrong code.
    """
    pairs = dataset.pairs
    for image_path, mask_path in pairs[:: max(1, len(pairs) // headers)]:
        if mask_path.suffix.lower() not in MASK_SUFFIXES:
            continue  # not a picture: its reader sees to it
        if displayed_size(image_path) != displayed_size(mask_path):
            # Decoded to be sure: an orientation can stand where a header does not show it.
            dataset.decode((image_path, mask_path))
    for pair in pairs[:: max(1, len(pairs) // samples)]:
        dataset.decode(pair)


def _size_error(
    image_path: Path, mask_path: Path, image_size: Sequence[int], mask_size: Sequence[int]
) -> InputError:
    return InputError(
        f"{image_path} is {image_size[1]}x{image_size[0]} (width x height), but its mask "
        f"{mask_path} is {mask_size[1]}x{mask_size[0]}; a pair must have one size"
    )
