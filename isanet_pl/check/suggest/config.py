"""The text of a suggested config: every choice with its reason, and the numbers behind it."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from isanet_pl.check.fingerprint import Fingerprint
from isanet_pl.check.suggest.geometry import WHOLE_CROPS, Geometry, attention_cost, plan_geometry
from isanet_pl.check.suggest.machine import MEMORY_SHARE, Machine
from isanet_pl.check.suggest.schedule import Schedule, plan_schedule

RARE = 0.01
"""Share of the labelled pixels below which a class is rare."""
MANY_CLASSES = 30
"""From as many on, the hard pixels of all classes are chosen instead of weights for each."""
DOMINANT = 0.6
"""Share of one class from which most crops have more of it than the usual limit of 0.75."""
SECONDS_PER_PIXEL = {"bf16-mixed": 6e-6, "32-true": 22e-6}
"""Of one core for a pixel of a crop, the ResNet-18 without jemalloc, on two EPYCs: one with
AVX512-BF16, one with AVX2."""


@dataclass(frozen=True)
class Choice:
    """An entry of a config, such as `data.init_args.batch_size`, and the reason for its value."""

    key: str
    value: Any
    why: str = ""


def suggest_config(
    fingerprint: Fingerprint, machine: Machine, class_path: str, init_args: Mapping[str, Any]
) -> str:
    """Returns a config, YAML, that trains as it stands on the data set and the machine.

    Args:
        fingerprint: Of the data set; it has train and val.
        machine: What the config is for.
        class_path: Of the data module.
        init_args: Arguments of the data module that belong to the data; kept as they are.

    Raises:
        InputError: The memory is too small.
    """
    geometry = plan_geometry(fingerprint, machine)
    schedule = plan_schedule(fingerprint, machine, geometry)
    choices = [
        *_network(geometry, machine),
        *_loss(fingerprint, geometry, schedule),
        *_optimisation(machine, schedule),
        *_inference(fingerprint, geometry),
        Choice("data.class_path", class_path),
        *(Choice(f"data.init_args.{name}", value) for name, value in init_args.items()),
        *_images(fingerprint, geometry),
        *_batches(fingerprint, machine, geometry, schedule),
        *_length(machine, geometry, schedule),
    ]
    head = (
        f"Suggested by scripts/check_dataset.py for {fingerprint.data} in {fingerprint.root}: "
        f"{schedule.num_images} training images, {len(fingerprint.class_names)} classes; for "
        f"{machine}. A start that trains as it stands, not an optimum."
    )
    return _comment(head, "") + "#   isanet-pl fit --config THIS_FILE\n" + render(choices)


def _by(size: Sequence[float]) -> str:
    """Returns an (H, W) as people write it, width first."""
    return f"{size[1]:.0f}x{size[0]:.0f}"


def _network(geometry: Geometry, machine: Machine) -> Iterator[Choice]:
    why = {
        "cpu": "A small backbone and half the usual widths, as in "
        "configs/camvid_isanet_r18-d8.yaml: what a CPU trains in hours.",
        "cuda": "The published form, with mmsegmentation's ResNet-50 and its widths.",
    }[machine.device]
    for name, value in machine.recipe.network.items():
        yield Choice(f"model.network.{name}", value, why)
        why = "Downloads timm's ImageNet weights; or weights_path: FILE." * (name == "backbone")
    height, width = geometry.feature_size
    window = geometry.window
    cost = attention_cost(height, width, window)
    yield Choice(
        "model.network.down_factors",
        [window],
        f"The cheapest window, up to twice as long as wide, for the {_by((height, width))} "
        f"positions of a crop: {cost / 1e6:.2f} million pairs of them, padding included. [8, 8] "
        f"has {attention_cost(height, width, (8, 8)) / 1e6:.2f} million, attention without windows "
        f"{(height * width) ** 2 / 1e6:.1f}.",
    )


def _loss(fingerprint: Fingerprint, geometry: Geometry, schedule: Schedule) -> Iterator[Choice]:
    shares = fingerprint.splits["train"].shares
    names = fingerprint.class_names
    seen = {name: share for name, share in zip(names, shares, strict=True) if share}
    rarest = min(seen, key=lambda name: seen[name])
    few = sum(share < RARE for share in seen.values())
    fact = f"The rarest class, {rarest}, has {seen[rarest]:.2%} of the labelled pixels"
    if not few:
        yield Choice("model.loss", {}, f"{fact}: no class is so rare that it needs a weight.")
        return
    fact += f", and {few} of {len(names)} have less than {RARE:.0%}"
    if len(names) <= MANY_CLASSES:
        weights = [round(1 / math.log(1.1 + share), 2) for share in shares]
        yield Choice("model.loss.class_weights", weights, f"{fact}: 1 / log(1.1 + share of each).")
        return
    kept = schedule.batch_size * geometry.crop_pixels // 10
    yield Choice(
        "model.loss.ohem_threshold",
        0.7,
        f"{fact}: OHEM. Only pixels whose class has a probability of 0.7 or less count, and at "
        "least a tenth of a batch.",
    )
    yield Choice("model.loss.ohem_min_kept", kept)


def _optimisation(machine: Machine, schedule: Schedule) -> Iterator[Choice]:
    if machine.device == "cpu":
        optimizer = {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 0.0003, "weight_decay": 0.01},
        }
        yield Choice(
            "model.optimizer",
            optimizer,
            "A short run: AdamW with a warm-up, new layers faster, as in "
            "configs/camvid_isanet_r18-d8.yaml.",
        )
        yield Choice("model.new_layers_lr_factor", 3.3)
        yield Choice("model.warmup_fraction", 0.1)
        yield Choice("model.end_lr_factor", 0.0)
    images = schedule.step_images
    why = f"The learning rate is for {schedule.reference} crops a step; a step has {images}"
    yield Choice("model.reference_batch_size", schedule.reference, f"{why}.")
    if images != schedule.reference:
        yield Choice("model.scale_lr", True, "So it is scaled to the smaller step.")


def _inference(fingerprint: Fingerprint, geometry: Geometry) -> Iterator[Choice]:
    height, width = geometry.largest
    classes = len(fingerprint.class_names)
    gigabytes = 2 * 4 * classes * height * width / 1e9  # fp32, resized to the image's own size
    memory = ""
    if gigabytes > 1:
        memory = f" The scores of the largest, {_by(geometry.largest)}, take {gigabytes:.1f} GB."
    if not geometry.slide:
        why = f"Images to evaluate have at most {WHOLE_CROPS} crops' area: seen at once.{memory}"
        yield Choice("model.inference.mode", "whole", why)
        return
    why = f"Some images to evaluate have over {WHOLE_CROPS} crops' area: by windows.{memory}"
    yield Choice("model.inference.mode", "slide", why)
    yield Choice("model.inference.crop_size", geometry.crop_size)


def _images(fingerprint: Fingerprint, geometry: Geometry) -> Iterator[Choice]:
    train = fingerprint.splits["train"]
    smallest, median, largest = (_by(train.size_at(quantile)) for quantile in (0, 0.5, 1))
    sizes = (
        f"All images are {median}"
        if len(train.sizes) == 1
        else f"Images are {smallest} to {largest}, the median is {median}"
    )
    if geometry.base_size is None:
        why = f"{sizes}: they stay as they are."
    else:
        why = (
            f"{sizes}: scaled to fit into these (long, short) edges, {_by(geometry.image_size)} in "
            "the median. Tiny ones are enlarged, as a position of the network is 8 pixels wide; "
            "huge ones shrink, so that a crop shows enough of the scene. If details would be lost "
            "(from above, through a microscope, scans), set null and model.inference.mode slide."
        )
    yield Choice("data.init_args.base_size", geometry.base_size, why)
    share = geometry.crop_pixels / math.prod(geometry.image_size)
    why = f"(H, W): {min(1.0, share):.0%} of the median image, in multiples of the stride, 8."
    yield Choice("data.init_args.crop_size", geometry.crop_size, why)
    low, high = geometry.scale_range
    why = f"At {low} the image still fills {min(1, low**2 / share):.0%} of a crop; {high} is usual."
    yield Choice("data.init_args.scale_range", [low, high], why)
    largest_share = max(train.shares)
    if largest_share > DOMINANT:
        name = fingerprint.class_names[train.shares.index(largest_share)]
        why = f"{name} has {largest_share:.1%} of the pixels: crops with less of it are not sought."
        yield Choice("data.init_args.cat_max_ratio", 1.0, why)


def _batches(
    fingerprint: Fingerprint, machine: Machine, geometry: Geometry, schedule: Schedule
) -> Iterator[Choice]:
    room = machine.room(len(fingerprint.class_names)) // geometry.crop_pixels
    why = (
        f"A step takes about {schedule.step_bytes / 1e9:.1f} GB; {room} crops would fit into "
        f"{MEMORY_SHARE:.0%} of {machine.memory / 1e9:.0f} GB."
    )
    yield Choice("data.init_args.batch_size", schedule.batch_size, why)
    yield Choice("trainer.accelerator", "gpu" if machine.device == "cuda" else "cpu")
    yield Choice("trainer.devices", schedule.num_devices)
    if schedule.num_devices > 1:
        yield Choice("trainer.sync_batchnorm", True)
    why = f"{schedule.step_images} crops a step"
    if schedule.step_images < schedule.reference:
        why += f", fewer than {schedule.reference}, as there are {schedule.num_images} images"
    yield Choice("trainer.accumulate_grad_batches", schedule.accumulate, f"{why}.")


def _length(machine: Machine, geometry: Geometry, schedule: Schedule) -> Iterator[Choice]:
    low, high = machine.recipe.steps
    why = (
        f"{schedule.epochs:.0f} epochs of {schedule.num_images / schedule.step_images:.1f} steps; "
        f"the aim is {machine.recipe.epochs} epochs, {low} to {high} steps."
    )
    if machine.device == "cpu":
        crops = schedule.num_steps * schedule.step_images
        hours = crops * geometry.crop_pixels * SECONDS_PER_PIXEL[machine.precision] / 3600
        why += f" About {hours:.1f} hours of one core."
    yield Choice("trainer.max_steps", schedule.num_steps, why)
    batches = schedule.num_steps * schedule.accumulate // schedule.num_validations
    why = f"In batches: {schedule.num_validations} validations."
    yield Choice("trainer.val_check_interval", batches, why)
    yield Choice("trainer.check_val_every_n_epoch", None)
    if machine.device == "cuda":
        yield Choice("last_checkpoint.every_n_steps", 1000, "Steps are fast on a GPU.")
    why = "This device has no instructions for bfloat16." * (machine.precision != "bf16-mixed")
    yield Choice("trainer.precision", machine.precision, why)
    if machine.device == "cpu":
        yield Choice("trainer.gradient_clip_val", 5)


def render(choices: Sequence[Choice], indent: str = "") -> str:
    """Returns choices as YAML, nested by the dots in their keys, each below its reason."""
    lines = ""
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        head, _, rest = choice.key.partition(".")
        groups.setdefault(head, []).append(Choice(rest, choice.value, choice.why))
    for name, group in groups.items():
        if group[0].key:
            lines += f"{indent}{name}:\n{render(group, indent + '  ')}"
        else:
            lines += f"{_comment(group[0].why, indent)}{indent}{name}: {_inline(group[0].value)}\n"
    return lines


def _inline(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str) -> str:
    start = f"{indent}# "
    wrapped = textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=start)
    return "".join(f"{line}\n" for line in wrapped)
