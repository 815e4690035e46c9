"""Going on with a run as if nothing had happened: its newest checkpoint, its metrics so far."""

import csv
import io
import logging
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from isanet_pl.callbacks.last_checkpoint import LAST
from isanet_pl.checkpoint_io import read_checkpoint
from isanet_pl.errors import InputError
from isanet_pl.run_folder import CHECKPOINTS, run_folders

log = logging.getLogger(__name__)


def find_run(runs_dir: str, name: str) -> tuple[Path, Path] | None:
    """Returns the folder and the newest checkpoint of the last run of a name; None: nothing yet.

    A checkpoint from the middle of a step counts as nothing.

    Raises:
        InputError: The run has checkpoints, but none of them is whole.
    """
    runs = run_folders(Path(runs_dir) / name)
    fits = [run / CHECKPOINTS for run in runs if (run / CHECKPOINTS).is_dir()]
    if not fits:
        return None
    folder = fits[-1]
    # Others only for want of last.ckpt: they may be written in the middle of a step.
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
    files.sort(key=lambda file: file.name != LAST)
    whole = [file for file in files if zipfile.is_zipfile(file)]
    if files and not whole:
        raise InputError(
            f"no checkpoint in {folder} is whole ({', '.join(file.name for file in files)}): "
            f"remove {folder.parent} to start anew"
        )
    for file in files[: files.index(whole[0]) if whole else 0]:
        log.warning("%s is damaged: resuming from %s", file, whole[0])
    if not whole or _is_mid_step(whole[0]):
        return None
    return folder.parent, whole[0]


def _is_mid_step(checkpoint: Path) -> bool:
    """Returns whether a run that went on from a checkpoint would lose a part of a step."""
    if checkpoint.name == LAST:  # never is
        return False
    try:
        states = read_checkpoint(str(checkpoint)).get("callbacks", {})
    except InputError:  # what is wrong with it is said when it is read
        return False
    return bool(states.get("LastCheckpoint", {}).get("mid_step"))


def continue_metrics(logger: CSVLogger, checkpoint: str) -> None:
    """Gives a new logger the lines of its metrics.csv that are older than a checkpoint.

    By itself it would remove the file. Lines of later steps will be written again. A line that a
    full disk or a killed process has cut short is left out.
    """
    content = read_checkpoint(checkpoint)
    step = content["global_step"]
    # If not, a validation of this step came after the checkpoint, and will come again.
    validated = content.get("callbacks", {}).get("LastCheckpoint", {}).get("validated", True)
    file = Path(logger.log_dir) / "metrics.csv"
    kept = file.with_name(file.name + ".old")
    if not kept.exists() and file.is_file():
        file.replace(kept)
    if not kept.exists():
        return
    logger.experiment.metrics = [
        # The validation of a step is logged under its number, its loss under the one before.
        row
        for row in _whole_rows(kept)
        if int(row["step"]) < step
        or (int(row["step"]) == step and "train/loss" not in row and validated)
    ]
    # Until the new file is whole, the old one stays: a run that cannot write it can be resumed.
    logger.save()
    kept.unlink()


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """Returns what the lines of a metrics.csv hold, without those that were not written whole."""
    content = path.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode("utf-8")
    return [
        {k: v for k, v in row.items() if v}
        for row in csv.DictReader(io.StringIO(text, newline=""))
        if None not in row and None not in row.values()  # neither more fields than names nor fewer
    ]
