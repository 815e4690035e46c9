"""What `predict` writes: masks, overlays, probabilities and class shares, one image at a time."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from isanet_pl.callbacks.last_checkpoint import terminated
from isanet_pl.checkpoint_io import write_text_whole, write_whole
from isanet_pl.data import Images
from isanet_pl.errors import InputError
from isanet_pl.pictures import overlay

SHOWN = 20  # errors that are listed at the end


class PredictionWriter(pl.Callback):
    """Writes each image's prediction at the image's own size, under its own name.

    A file is complete as soon as it has its name, and the mask is written last: a run that was
    stopped goes on with the images that have no mask yet when it is given the same folder again.

    Args:
        output: Folder for `masks/NAME.png` (palette PNG of class indices), `overlays/NAME.png` and
            `shares.json` (share of each class in each image); None: `predictions` in the run
            folder.
        probabilities: Write `probabilities/NAME.npz` as well: `probabilities`, float16 (K, H, W).
        server_format: Write masks with the codes of the data set's own files, as the test servers
            of Cityscapes (label ids) and ADE20K (1..150) take them; give the data set with --data.
    """

    def __init__(
        self,
        output: str | None = None,
        probabilities: bool = False,
        server_format: bool = False,
    ) -> None:
        self.output = output
        self.probabilities = probabilities
        self.server_format = server_format
        self.checkpoint: Path | None = None
        """What is loaded; the trainer knows it only later than the folder is claimed."""
        self.folder = Path("predictions")
        self.errors: list[str] = []
        self.written = 0
        self.start = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Claims the folder before `predict`.

        Raises:
            InputError: It holds another model's predictions, or those of other images, or cannot be
                written.
        """
        if stage != "predict":
            return
        if self.server_format and isinstance(trainer.datamodule, Images):  # type: ignore[attr-defined]
            raise InputError(
                "--predictions.server_format needs the data set whose codes are wanted: --data "
                "Cityscapes or --data ADE20K"
            )
        # All processes ask for it together, as the first one knows it.
        self.folder = Path(self.output or Path(trainer.log_dir or ".") / "predictions")
        self.errors, self.written = [], 0
        self.start = time.monotonic()
        pl_module.predict_probabilities = self.probabilities  # type: ignore[assignment]
        if not trainer.is_global_zero:
            return
        path = self.folder / "model.json"
        model = self._describe(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        before = None
        try:
            if path.is_file():
                before = json.loads(path.read_text("utf-8"))
            # Without that file, nothing tells whose the masks are.
            if before != model and (before or (self.folder / "masks").exists()):
                raise InputError(
                    f"{path.parent} holds predictions of another checkpoint, other images or other "
                    f"settings (see {path.name}): choose another --output, or remove the folder"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_whole(path, json.dumps(model, indent=2) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write to {path.parent}: {error.strerror}; choose another --output"
            ) from error

    def _describe(self, pl_module: Any, data: Any) -> dict[str, Any]:
        description = {
            "checkpoint": str(self.checkpoint.resolve()) if self.checkpoint else None,
            "written": self.checkpoint.stat().st_mtime if self.checkpoint else None,
            "images": str(Path(data.predict_dir).resolve()),
            "class_names": pl_module.class_names,
            "inference": dataclasses.asdict(pl_module.inference),
            "probabilities": self.probabilities,
            "server_format": self.server_format,
        }
        # As it reads back: lists in place of tuples.
        read: dict[str, Any] = json.loads(json.dumps(description))
        return read

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the batch.

        Raises:
            SIGTERMException: The process was asked to end; the same command goes on from here.
        """
        self.errors += [*batch.get("error", []), *outputs.get("error", [])]
        for i, classes in enumerate(outputs.get("classes", ())):
            name = batch["name"][i]
            colours = overlay(batch["image"][i], classes, pl_module.palette)  # type: ignore[arg-type]
            self._save(f"overlays/{name}.png", _png(Image.fromarray(colours)))
            if self.probabilities:
                values = outputs["probabilities"][i].cpu().numpy()
                self._save(f"probabilities/{name}.npz", _npz(values))
            mask = self._mask(trainer, pl_module, classes.cpu().numpy().astype(np.uint8))
            self._save(f"masks/{name}.png", _png(mask))
            self.written += 1
        if trainer.received_sigterm:
            raise terminated(trainer)

    def _mask(
        self, trainer: pl.Trainer, pl_module: Any, classes: npt.NDArray[np.uint8]
    ) -> Image.Image:
        if self.server_format:
            codes = np.array(trainer.datamodule.mask_codes(), dtype=np.uint8)  # type: ignore[attr-defined]
            return Image.fromarray(codes[classes])
        mask = Image.fromarray(classes)
        mask.putpalette([value for colour in pl_module.palette for value in colour])
        return mask

    def _save(self, name: str, save: Callable[[Path], Any]) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save)
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}; what is written stays, and the same "
                "command goes on from there"
            ) from error

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the class shares and says what was done.

        Raises:
            InputError: Some images could not be read; all others are written.
        """
        parts = [(self.written, self.errors)]
        if trainer.world_size > 1:
            parts = [(0, [])] * trainer.world_size
            torch.distributed.all_gather_object(parts, (self.written, self.errors))
        written = sum(count for count, _ in parts)
        errors = [error for _, some in parts for error in some]
        if trainer.is_global_zero:
            total = self._write_shares(trainer, pl_module)
            speed = written / max(1e-9, time.monotonic() - self.start)
            print(f"{written} images done ({speed:.1f} images/s), {self.folder} now holds {total}")
        trainer.strategy.barrier()
        if errors:
            more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
            count = "1 image" if len(errors) == 1 else f"{len(errors)} images"
            raise InputError(
                f"{count} could not be segmented, all others are in {self.folder}:\n  "
                + "\n  ".join(errors[:SHOWN])
                + more
            )

    def _write_shares(self, trainer: pl.Trainer, pl_module: Any) -> int:
        """Writes the share of each class in each mask of the folder; returns how many there are."""
        folder = self.folder
        names = pl_module.class_names
        labels = dict(enumerate(names))
        if self.server_format:
            codes = trainer.datamodule.mask_codes()  # type: ignore[attr-defined]
            labels = dict(zip(codes, names, strict=True))
        shares: dict[str, Mapping[str, float]] = {}
        for path in sorted((folder / "masks").rglob("*.png")):
            with Image.open(path) as mask:
                counts = np.bincount(np.asarray(mask).ravel(), minlength=1)
            name = path.relative_to(folder / "masks").with_suffix("").as_posix()
            shares[name] = {
                labels[int(code)]: round(float(counts[code] / counts.sum()), 6)
                for code in np.flatnonzero(counts)
            }
        text = json.dumps(shares, indent=1) + "\n"  # ASCII: a name may be no UTF-8
        write_text_whole(folder / "shares.json", text)
        return len(shares)


def _png(picture: Image.Image) -> Callable[[Path], None]:
    return lambda path: picture.save(path, format="PNG")


def _npz(probabilities: npt.NDArray[np.float16]) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:  # given a name, numpy would add an ending
            np.savez_compressed(file, probabilities=probabilities)

    return save
