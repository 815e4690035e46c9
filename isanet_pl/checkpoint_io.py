"""Files written whole or not at all; checkpoints are also read without executing anything."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from isanet_pl.errors import InputError

PART = ".part"
"""Ending of a file that is not yet whole."""
WRITTEN_BY_LIGHTNING = {"state_dict", "pytorch-lightning_version"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint in one piece or not at all; reads data only, nothing that executes."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint; see `save_whole`.

        Raises:
            InputError: It cannot be written, as when the disk is full; the old one stays.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_whole(checkpoint, path)
        except OSError as error:
            kept = "the one before it is kept" if path.exists() else "there is none before it"
            raise InputError(
                f"cannot write the checkpoint {path}: {error.strerror}; {kept}. Make room, then go "
                "on with the same command and --resume true"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Returns the content of a checkpoint; see `read_checkpoint`.

        Raises:
            InputError: The file is damaged, holds anything but data, or is no checkpoint.
        """
        content = read_checkpoint(path)
        if not content.keys() >= WRITTEN_BY_LIGHTNING:
            raise _no_checkpoint(path)
        return content


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns the content of a checkpoint, on the CPU.

    Raises:
        InputError: The file is damaged, holds anything but data, or is no checkpoint.
    """
    try:
        # Pages of the file, not a copy: some callers look at a few numbers only.
        content: Any = torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes torch do
        raise InputError(
            f"{path} is damaged, or holds more than data: nothing in it was executed; give another"
        ) from error
    if not isinstance(content, dict):
        raise _no_checkpoint(path)
    return content


def _no_checkpoint(path: str | Path) -> InputError:
    return InputError(
        f"{path} is no checkpoint of isanet-pl; weights of other projects become one with "
        "scripts/convert_checkpoint.py, those of a backbone go to --model.network.weights_path"
    )


def save_whole(content: Any, path: Path) -> None:
    """Writes what `torch.save` would; it is on the disk when it takes its place.

    Raises:
        OSError: It cannot be written, as when the disk is full; a file that was there stays.
    """
    data = io.BytesIO()  # torch itself makes another error of a full disk
    torch.save(content, data)

    def save(part: Path) -> None:
        with part.open("wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # or, after a power cut, the name could lead to nothing

    write_whole(path, save)


def write_text_whole(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write_text(text, "utf-8"))


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Writes a file beside the one of that name, and puts it in its place once it is whole."""
    part = path.with_name(path.name + PART)
    try:
        save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
