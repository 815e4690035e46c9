"""What the command line of a training says of it."""

import shlex
from pathlib import Path

from reporting.labels import NO_DIFFERENCE, starts, without_group
from reporting.resumed_runs import is_of, name_of

# What is said elsewhere: by the row's beginning, the start of the training, and the columns.
# Of the last checkpoint, the times of validations change nothing.
UNTOLD = ("config", "data", "data.root", "model.network.pretrained", "model.network.weights_path",
          "trainer.max_steps", "trainer.val_check_interval")  # fmt: skip


def read_options(command: str) -> list[tuple[str, str]]:
    """Returns the options of an isanet-pl command line and their values, in order.

    Names are without dashes, and in one of the spellings that a command line takes.
    """
    words = iter(shlex.split(command)[2:])
    options = []
    for word in words:
        name, equals, value = word.partition("=")
        name = "config" if name == "-c" else name.removeprefix("--").replace(".init_args.", ".")
        options.append((name, value if equals else next(words, "")))
    return options


def describe(command: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Returns the configs of a training, and what changes it: options, and another as its start.

    Args:
        command: Of the training.
        folder: Of its run.
    """
    options = read_options(command)
    configs = [
        # What a run has saved is called config.yaml in each run folder.
        value if Path(value).name == "config.yaml" else Path(value).stem
        for name, value in options
        if name == "config"
    ]
    changes = [
        f"{without_group(name)}={value}"
        for name, value in options
        if name not in UNTOLD and not starts(name, NO_DIFFERENCE)
    ]
    *_, start = find_start(command, folder)
    if start:
        changes.append(f"from {_name_start(Path(start))}")
    return " + ".join(configs), tuple(changes)


def _name_start(checkpoint: Path) -> str:
    """Returns the run of a checkpoint as NAME/version_N, or a checkpoint of no run as it is."""
    if checkpoint.parent.name != "checkpoints":
        return str(checkpoint)
    run = checkpoint.parent.parent
    return "/".join(part for part in (*name_of(run), run.name) if part) or str(checkpoint)


def find_start(command: str, folder: Path) -> tuple[str | None, ...]:
    """Returns the weights that a training started from, the checkpoint of another one last.

    That one is told from the training itself by its name alone, and from the weights of a backbone
    by its ending.

    Args:
        command: Of the training.
        folder: Of its run.
    """
    options = dict(read_options(command))
    weights, checkpoint = options.get("model.network.weights_path"), options.get("ckpt_path")
    other = checkpoint if checkpoint and not is_of(checkpoint, folder) else None
    if other is None and weights is not None and Path(weights).suffix == ".ckpt":
        other = weights
    return weights, options.get("model.network.pretrained"), other
