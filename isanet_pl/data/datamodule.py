"""The base of every data set: pairs to samples to loaders."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from isanet_pl.data.broken import BrokenFiles
from isanet_pl.data.cache import DecodedCache
from isanet_pl.data.colours import distort
from isanet_pl.data.dataset import (
    CodeTable,
    ImageDataset,
    PairDataset,
    Sample,
    check_pairs,
    code_table,
    collate,
)
from isanet_pl.data.files import MAX_PIXELS, Codes, Pair, read_mask
from isanet_pl.data.palette import Colour
from isanet_pl.data.sampler import (
    DrawLoader,
    DrawnSamples,
    DrawSampler,
    Position,
    outlive_termination,
)
from isanet_pl.data.transforms import TrainTransform
from isanet_pl.errors import InputError
from isanet_pl.hardware import num_cores

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]


class SegmentationDataModule(pl.LightningDataModule):
    """Loads a segmentation data set. A subclass gives its facts and lists its pairs.

    Training batches are random crops; validation and test images come at their own size. Images
    leave here as uint8; the network normalises them on its device.

    Args:
        root: Folder of the data set.
        batch_size: Training images per batch and device.
        crop_size: (H, W) of training crops.
        scale_range: Random scale of training images, uniform between the two.
        base_size: (long, short) edge that images are scaled to, keeping their shape, before all
            else: `scale_range` is relative to it, and so is evaluation. null: their own size.
        cat_max_ratio: Avoid training crops of which one class has this share or more; 1: take all.
        flip: Mirror training images at random.
        photometric: Distort colours of training images at random, on the device.
        num_workers: Loader processes of each device, and as many again for validation; None: one
            for each core, at most 8.
        eval_batch_size: Validation and test images per step; above 1 all must have one size.
        predict_dir: Folder of images for `predict`, searched with its sub-folders, those too that
            are links.
        predict_output: Folder that predictions are written to; images that have a mask there are
            left out. The command line takes it from --output.
        max_pixels: Larger images are refused by `predict`; the default is Pillow's limit against
            files that unpack to more than the memory holds.
        cache: Folder for decoded images and masks (4 bytes a pixel): each file is decoded once, and
            crops then read their own rows only. Runs may share it. Best on a local SSD, or where
            all of it fits into memory. A disk that becomes full is named, and nothing more stored.
            null: decode every time.
        on_error: What a training image or mask that cannot be read does: `raise` ends the run,
            `skip` names it and takes another in its place, until more than 1 % of a pass were
            replaced. In evaluation it always ends the run, or the score would be of other images.
        train_on_val: Train on the validation images too, for a last run whose test score or
            submission counts. Validation is then no measure of anything.

    Raises:
        InputError: An argument is out of its range, or this is no data set but the base of them.
    """

    class_names: Sequence[str]
    """K names."""
    palette: Sequence[Colour]
    """K colours, RGB 0..255."""
    label_map: dict[int, int] | None = None
    """Class (or 255) of each code in the mask files; None: codes are classes."""
    reduce_zero_label: bool = False
    """Code 0 in the mask files means ignore, code i class i - 1."""
    read_codes: Callable[[Path], Codes] = staticmethod(read_mask)
    """Returns the codes (H, W) of a mask file; for masks that are not pictures."""
    mirrored_classes: Sequence[tuple[int, int]] = ()
    """Pairs of classes that a mirror turns into each other, such as left and right arm."""
    num_images: dict[str, int] = {}
    """Images of each split that has labels, as documented."""
    homepage: str = ""
    """Where to get it, for messages."""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        crop_size: tuple[int, int] = (512, 512),
        scale_range: tuple[float, float] = (0.5, 2.0),
        base_size: tuple[int, int] | None = None,
        cat_max_ratio: float = 0.75,
        flip: bool = True,
        photometric: bool = True,
        num_workers: int | None = None,
        eval_batch_size: int = 1,
        predict_dir: str | None = None,
        predict_output: str | None = None,
        max_pixels: int = MAX_PIXELS,
        cache: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        train_on_val: bool = False,
    ) -> None:
        super().__init__()
        if type(self) is SegmentationDataModule:
            raise InputError("no data set is named: --data NAME --data.root DIR, as --data CamVid")
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(f"batch sizes must be at least 1: {batch_size}, {eval_batch_size}")
        if num_workers is not None and num_workers < 0:
            raise InputError(f"data.num_workers must be 0 or more: {num_workers}")
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = min(8, num_cores()) if num_workers is None else num_workers
        self.predict_dir = predict_dir
        self.predict_output = predict_output
        self.max_pixels = max_pixels
        self.base_size = base_size
        self.train_transform = TrainTransform(
            crop_size, scale_range, base_size, cat_max_ratio, flip, self.mirrored_classes
        )
        self.photometric = photometric
        self.cache = cache
        self.skip_broken = on_error == "skip"
        self.train_on_val = train_on_val
        self._broken: BrokenFiles | None = None  # of a fit that skips them
        self._decoded: DecodedCache | None = None  # one for all splits
        self._told_of_cache = False
        self._datasets: dict[str, Dataset[Sample]] = {}
        self._position: Position | None = None  # of a fit, in the stream of training samples

    @property
    def num_classes(self) -> int:
        """Returns K."""
        return len(self.class_names)

    @property
    def table(self) -> CodeTable:
        """Returns the class of each mask code; see `code_table`."""
        return code_table(self.num_classes, self.label_map, self.reduce_zero_label)

    def list_pairs(self, split: Split) -> list[Pair]:
        """Returns the (image, mask) files of a split.

        Raises:
            InputError: A folder is missing or empty, or files have no partner.
        """
        raise NotImplementedError

    def build_dataset(self, split: Split) -> Dataset[Sample]:
        """Returns the samples of a split, checked; see `check_pairs`."""
        train = split == "train"
        pairs = self.list_pairs(split)
        if train and self.train_on_val:
            pairs = [*pairs, *self.list_pairs("val")]
        if self.cache is not None and self._decoded is None:
            # Masks are kept as classes, so what maps them belongs to the key; a reader that is no
            # function says by its repr what it does.
            function = getattr(self.read_codes, "__qualname__", self.read_codes)
            reader = f"{self.read_codes.__module__}.{function}"
            self._decoded = DecodedCache(Path(self.cache), self.table.tobytes() + reader.encode())
        dataset = PairDataset(
            pairs,
            self.table,
            self.num_classes,
            self.train_transform if train else None,
            self.read_codes,
            photometric=train and self.photometric,
            cache=self._decoded,
        )
        if not (train and self.skip_broken):
            check_pairs(dataset)
        return dataset

    @property
    def root_path(self) -> Path:
        """Returns the root.

        Raises:
            InputError: It was not given, or is no folder.
        """
        name = type(self).__name__
        if self.root is None:
            raise InputError(f"{name} needs its folder: --data.root DIR")
        path = Path(self.root)
        if not path.is_dir():
            raise InputError(f"{name}: no such folder: --data.root {path}")
        return path

    def setup(self, stage: str) -> None:
        """Builds what a stage needs, once."""
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
        }
        needed = splits.get(stage, ())
        if stage == "fit" and self.trainer is not None and self.trainer.limit_val_batches == 0:
            needed = ("train",)
        for split in needed:
            if split not in self._datasets:
                self._datasets[split] = self.build_dataset(split)
            self._check_shares(split)
        self._check_space([self._datasets[split] for split in needed])
        if stage == "fit":
            self._start_stream()
        if stage == "predict":
            self._find_images()

    def _start_stream(self) -> None:
        """Makes sure that there is a batch, and begins the stream of training samples."""
        train = self._datasets["train"]
        assert isinstance(train, Sized)
        if self.train_on_val:
            test = " and test scores, whose images are the same," * self._tests_on_val()
            rank_zero_only(log.warning)(
                f"train_on_val: the validation images are trained on, val scores{test} measure "
                "nothing: take last.ckpt, not best.ckpt"
            )
        num_ranks = self._ranks[1]
        if len(train) < self.batch_size * num_ranks:
            batch = f"{self.batch_size}" + (f" on {num_ranks} devices" if num_ranks > 1 else "")
            raise InputError(
                f"the train split has {len(train)} images, fewer than one batch of {batch}: "
                f"set --data.batch_size {len(train) // num_ranks} or less"
            )
        # With `--seed_everything false` each process has one of its own. A checkpoint, which is
        # read later, may set another.
        seed = torch.initial_seed()
        if self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)
        self._position = Position(seed)

    def _find_images(self) -> None:
        """Lists the images to predict."""
        if self.predict_dir is None:
            raise InputError("predict needs a folder of images: --data.predict_dir DIR")
        output = None if self.predict_output is None else Path(self.predict_output)
        images = ImageDataset(Path(self.predict_dir), output, self.max_pixels)
        if not len(images):
            log.info("every image of %s has its mask in %s", self.predict_dir, self.predict_output)
        self._datasets["predict"] = images
        self._check_shares("predict")

    def _tests_on_val(self) -> bool:
        """Returns whether `test` is val, as where the labels of the test images are not public."""
        try:
            return self.list_pairs("test") == self.list_pairs("val")
        except (InputError, NotImplementedError):  # there is no test split, or there are no files
            return False

    def _check_shares(self, name: str) -> None:
        """Makes sure that each process gets an image, or none does, so that nobody waits for it."""
        dataset, num_ranks = self._datasets[name], self._ranks[1]
        assert isinstance(dataset, Sized)
        if 0 < len(dataset) < num_ranks:
            raise InputError(
                f"{name} has {len(dataset)} images, fewer than the {num_ranks} devices: set "
                f"--trainer.devices {len(dataset)} or less"
            )

    def mask_codes(self) -> list[int]:
        """Returns the code that each class has in the data set's own mask files.

        Raises:
            InputError: `label_map` gives a class no code.
        """
        codes = list(range(self.num_classes))
        if self.label_map is not None:
            first = {index: code for code, index in reversed(self.label_map.items())}
            without = [self.class_names[index] for index in codes if index not in first]
            if without:
                raise InputError(f"label_map has no code for the classes {', '.join(without)}")
            codes = [first[index] for index in codes]
        return [code + 1 for code in codes] if self.reduce_zero_label else codes

    def _check_space(self, datasets: Sequence[Dataset[Sample]]) -> None:
        """Makes sure that the cache can take the samples of all the splits together."""
        if self._decoded is not None:
            cached = [d for d in datasets if isinstance(d, PairDataset)]
            pairs = dict.fromkeys(pair for d in cached for pair in d.pairs)  # train_on_val: once
            self._decoded.check_space(list(pairs))

    @property
    def _ranks(self) -> tuple[int, int]:
        """Returns the number of this process and of all processes of a run."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _add_up(self, number: int) -> int:
        """Returns the sum of a number over all processes."""
        if self.trainer is None or self.trainer.world_size == 1:
            return number
        strategy = self.trainer.strategy
        total = torch.tensor(number, device=strategy.root_device)
        return int(strategy.reduce(total, reduce_op="sum"))

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: where training stands in the stream of samples."""
        return {} if self._position is None else dataclasses.asdict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the stream up where the checkpoint left it."""
        if self._position is not None and self._position.seed != state_dict["seed"]:
            log.info("training samples go on with the checkpoint's seed %d", state_dict["seed"])
        self._position = Position(**state_dict)

    def _loading(self) -> dict[str, Any]:
        """Returns what all loaders have in common."""
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": outlive_termination,
            # Python 3.14 would start a server for them, which SIGTERM to the group ends.
            "multiprocessing_context": (
                "fork" if self.num_workers and sys.platform == "linux" else None
            ),
            "pin_memory": self._device.type == "cuda",
            # Or each new loader would take a random number from dropout.
            "generator": torch.Generator(),
        }

    def _loader(self, name: str, batch_size: int) -> DataLoader[Sample]:
        dataset, (rank, num_ranks) = self._datasets[name], self._ranks
        # Each image on one rank. Lightning's own choice would fill up the shares with copies.
        sampler = (
            UnrepeatedDistributedSampler(dataset, num_ranks, rank, shuffle=False)
            if num_ranks > 1
            else None
        )
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **self._loading())

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Returns the batch with the colours of training images distorted, on its device.

        Raises:
            InputError: Too many training images cannot be read.
        """
        if self._broken is not None and "replaced" in batch:
            self._broken.take(batch.pop("replaced"))
        self._tell_of_cache()
        for image, jitter in zip(batch.get("image", ()), batch.pop("jitter", ()), strict=False):
            shown = image[:, : jitter.height, : jitter.width]  # padding keeps its colour
            shown.copy_(distort(shown, jitter))
        return batch

    def _tell_of_cache(self) -> None:
        """Says once that nothing more is cached; each loader process would say it again."""
        if self._told_of_cache or self._decoded is None or self._decoded.failure is None:
            return
        self._told_of_cache = True
        log.warning(
            "cannot write to --data.cache %s: %s. What is not cached yet is decoded each time from "
            "now on, which is slower; make space, and the next run goes on caching",
            self._decoded.folder,
            self._decoded.failure,
        )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Returns shuffled, augmented batches, all of them full, as BatchNorm wants them."""
        assert self._position is not None, "setup('fit') comes first"
        samples = DrawnSamples(self._datasets["train"], self._position.seed, self.skip_broken)
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        sampler = DrawSampler(samples, self.batch_size, self._position, *self._ranks, accumulated)
        if self.skip_broken:
            self._broken = BrokenFiles(len(samples), sampler.images_per_batch, self._add_up)
        return DrawLoader(samples, batch_size=self.batch_size, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Sample]:
        """Returns the validation images at their own size."""
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Returns the test images at their own size."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Returns the images of `predict_dir`, one by one."""
        return self._loader("predict", 1)
