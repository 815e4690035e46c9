"""The folder of a run: claiming a new one, and finding that of a trainer."""

import re
from pathlib import Path

import lightning.pytorch as pl

from isanet_pl.errors import InputError

CHECKPOINTS = "checkpoints"
"""Where a run keeps its checkpoints; made by `fit` alone."""


def new_run_folder(runs_dir: str, name: str) -> Path:
    """Creates and returns runs_dir/name/version_N with the first free N.

    Raises:
        InputError: The folder cannot be written.
    """
    parent = Path(runs_dir) / name
    version = 0
    while True:
        folder = parent / f"version_{version}"
        try:
            # Creating it claims it: two runs that start together cannot get the same one.
            folder.mkdir(parents=True, exist_ok=False)
            return folder
        except FileExistsError:
            version += 1
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {folder}: {error.strerror}; choose another --runs_dir"
            ) from error


def remove_if_empty(folder: Path) -> None:
    """Removes the folder of a run that has ended before it wrote anything."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def run_folders(parent: Path) -> list[Path]:
    """Returns the folders version_N of the runs of a name, by N.

    Copies that users make, such as version_0_old, are none.
    """
    named = ((re.fullmatch(r"version_(\d+)", path.name), path) for path in parent.glob("version_*"))
    versions = {int(match[1]): path for match, path in named if match}
    return [versions[number] for number in sorted(versions)]


def name_of_run(checkpoint: Path, runs_dir: Path) -> str:
    """Returns the name of the run that wrote a checkpoint; outside a run folder, the file's name.

    Args:
        checkpoint: RUNS_DIR/NAME/version_N/checkpoints/FILE, or a file elsewhere.
        runs_dir: Where runs are written now; a run that is not below it has its last folder's name.
    """
    folder = checkpoint.resolve().parent
    if folder.name != CHECKPOINTS or not folder.parent.name.startswith("version_"):
        return checkpoint.stem
    run = folder.parent.parent
    root = runs_dir.resolve()
    return run.relative_to(root).as_posix() if root in run.parents else run.name


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Returns the folder of the run, on the first process; None if nothing is logged.

    `trainer.log_dir` would wait for the other processes, which do not ask for it.
    """
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return next((Path(folder) for folder in folders if folder), None)
