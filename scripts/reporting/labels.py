"""Names settings by what differs between their configs."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.resumed_runs import name_of

Config = Mapping[str, Any]
"""A config by dotted key."""

NO_DIFFERENCE = (
    "seed_everything",
    "name",
    "runs_dir",
    "wandb",
    "ckpt_path",
    "weights_only",
    "verbose",
    "output",
    "predictions",
    "checkpoint",
    "last_checkpoint",
    "resume",
    "progress",
    "panels",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "data.num_workers",
    "data.cache",
    "data.eval_batch_size",
    "data.predict_dir",
    "data.predict_output",
)
"""Keys, and what keys begin with, that change nothing of what a network learns."""
GROUPS = ("model.network.", "model.", "data.", "trainer.")
"""Beginnings of options that go without saying: what follows is in one of them alone."""
PATHS = ("data.root", "model.network.weights_path")
"""Compared by their ends: the same data lie elsewhere on another machine."""
OF_EVALUATION = (
    "data.root",
    "data.base_size",
    "data.label_map",
    "data.reduce_zero_label",
    "data.num_eval",
    "model.inference",
    "trainer.precision",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
)
"""Keys that an evaluation chooses; everything else was chosen when the network was trained."""
MOST_PARTS = 3
"""Differences that a label can name and still be read."""


@dataclass(frozen=True)
class Kind:
    """What a setting is told from the others by.

    Args:
        config: What makes a difference.
        cell: Folder of the cell of a grid of ablations; empty if there is none.
        name: Of the run.
    """

    config: Config
    cell: str
    name: str


def find_kind(
    config: Config, folder: Path, trained: Config | None = None, weights: str = "", start: str = ""
) -> Kind:
    """Returns what a run is told from others by.

    Args:
        config: Of the run.
        folder: Of the training that it is, or that it evaluates.
        trained: The config of that training; None if it is not known.
        weights: What an evaluation evaluates; empty for a training.
        start: The checkpoint of another training that the training started from; empty for one
            from scratch, resumed or not.
    """
    if trained is not None and weights:
        kept = {key: value for key, value in trained.items() if not starts(key, OF_EVALUATION)}
        config = kept | {key: v for key, v in config.items() if starts(key, OF_EVALUATION)}
    own = {
        key: _end_of(Path(str(value))) if key in PATHS and value is not None else value
        for key, value in config.items()
        if not starts(key, NO_DIFFERENCE)
    }
    if weights:
        own["checkpoint"] = weights
    if start:
        own["start"] = start
    return Kind(own, *name_of(folder))


def _end_of(path: Path) -> str:
    """Returns what a path is compared by; all checkpoints of this project have the same name."""
    if path.parent.name != "checkpoints":
        return path.name
    home = path.parent.parent  # version_N, of a run or of the cell of a grid
    return "/".join((*name_of(home), *path.parts[-3:]))


def starts(key: str, beginnings: Sequence[str]) -> bool:
    """Returns whether a dotted key is one of some keys, or of a group that they name."""
    return any(key == b or key.startswith((f"{b}.", f"{b}_")) for b in beginnings)


def without_group(option: str) -> str:
    """Returns an option without the group that it is of."""
    group = next((group for group in GROUPS if option.startswith(group)), "")
    return option.removeprefix(group)


def find_labels(kinds: Sequence[Kind]) -> list[str]:
    """Returns a short label for each kind of a comparison, no two alike.

    That is the folder of the cell of a grid, where there is one; then what differs from most of
    the others; or the name of the run where there is too much to say.
    """
    cells: dict[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        cells[kind.cell].append(index)
    labels = [""] * len(kinds)
    for cell, members in cells.items():
        own, names = [kinds[i] for i in members], {kinds[i].name for i in members}
        # Beside a grid, a run of no grid that is evaluated in several ways says its name too.
        group = cell or (names.pop() if len(cells) > 1 and len(names) == 1 else "")
        for index, label in zip(members, _label(own), strict=True):
            labels[index] = group if group and len(members) == 1 else f"{group} {label}".strip()
    return labels


def _label(kinds: Sequence[Kind]) -> list[str]:
    names = [kind.name for kind in kinds]
    parts = find_differences([kind.config for kind in kinds])
    long = any(len(part) > MOST_PARTS for part in parts)
    if len(kinds) == 1 or (long and len(set(names)) == len(names)):
        return names
    labels = [", ".join(part) or "base" for part in parts]
    # Where a checkpoint lies tells the trainings behind it apart, if nothing else does.
    short = [", ".join(p for p in part if not _is_place(p)) or "base" for part in parts]
    if len(set(short)) == len(short):
        return short
    return [
        f"{label} ({name})" if labels.count(label) > 1 else label
        for label, name in zip(labels, names, strict=True)
    ]


def _is_place(part: str) -> bool:
    return part.startswith(("checkpoint=", "start=")) and "/" in part


def find_differences(configs: Sequence[Config]) -> list[list[str]]:
    """Returns, for each config, `key=value` of all keys that differ between them.

    A value that more of the configs have than any other goes without saying. A key that a config
    lacks says nothing of it: its version had no such option, or its class no such argument.
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))
    texts = {
        key: [_text(config[key]) if key in config else None for config in configs] for key in keys
    }
    varying = {key: values for key, values in texts.items() if len(set(values)) > 1}
    shortened = Counter(map(without_group, keys))
    found: list[list[str]] = [[] for _ in configs]
    for key, values in varying.items():
        if None in values and any(key.startswith(f"{other}.") for other in varying):
            continue  # the arguments of a class that others do not use: its name says enough
        counts = Counter(values).most_common(2)
        usual = counts[0][0] if counts[0][1] > counts[1][1] else None
        short = without_group(key)
        short = short if shortened[short] == 1 else key
        for parts, value in zip(found, values, strict=True):
            if value is not None and value != usual:
                parts.append(f"{short}={value}")
    return found


def _text(value: Any) -> str:
    """Returns a value as one would write it; of a class, its name."""
    if isinstance(value, str):
        return value.rsplit(".", 1)[-1] if value.startswith(("isanet_pl.", "torch.")) else value
    return json.dumps(value, default=str)
