"""What is wrong with a data set, judged from its fingerprint."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from isanet_pl.check.facts import Files
from isanet_pl.check.fingerprint import Fingerprint, SplitFingerprint
from isanet_pl.data.files import IGNORE
from isanet_pl.errors import few

Level = Literal["error", "warning"]

MUCH_IGNORED = 0.5
"""Share of ignored pixels that is worth a word: void and unlabelled things are seldom as much."""
MANY_CODES = 20
"""As many codes without a class are no longer labels but interpolated or compressed colours."""
DARK = 16
"""A split of 8-bit images without any brighter value was not saved as such."""


@dataclass(frozen=True)
class Problem:
    """Something wrong; with an error, training fails or learns the wrong thing."""

    level: Level
    split: str
    message: str


def find_problems(
    fingerprint: Fingerprint,
    eval_batch_size: int = 1,
    batch_size: int = 1,
    train_on_val: bool = False,
) -> list[Problem]:
    """Returns what is wrong, errors first.

    Args:
        fingerprint: Of the data set.
        eval_batch_size: Images that are evaluated together.
        batch_size: Images of a training step.
        train_on_val: The validation images are trained on too.
    """
    found = list(_find_duplicates(fingerprint))
    for name, split in fingerprint.splits.items():
        found += _find_in_files(name, split)
        if split.pixels:
            found += _find_in_labels(name, split, fingerprint.class_names)
        if name != "train" and eval_batch_size > 1 and len(split.sizes) > 1:
            message = f"{len(split.sizes)} image sizes cannot be evaluated {eval_batch_size} at a"
            found.append(Problem("error", name, f"{message} time: set --data.eval_batch_size 1"))
    if "train" in fingerprint.splits:
        found += _find_missing_classes(fingerprint)
        trained = ("train", "val") if train_on_val else ("train",)
        pairs = sum(s.num_pairs for name, s in fingerprint.splits.items() if name in trained)
        if pairs < batch_size:
            message = f"{pairs} images are fewer than one batch of {batch_size}: set"
            found.append(Problem("error", "train", f"{message} --data.batch_size {pairs} or less"))
    return sorted(found, key=lambda problem: problem.level)


def _many(files: Files, noun: str, text: str) -> str:
    """Returns such as "2 masks of another size: a.png, b.png"."""
    plural = "" if files.count == 1 else "s"
    return f"{files.count} {noun}{plural} {text}: {few(files.first, 3, files.count)}"


def _find_duplicates(fingerprint: Fingerprint) -> Iterator[Problem]:
    for kind, files in fingerprint.duplicates.items():
        if kind == "conflict":
            text = "twice in a split, with different masks; keep the right one"
            yield Problem("warning", "", _many(files, "image", text))
        elif "train and" in kind:
            text = "in more than one split: what was learnt by heart is evaluated; leave it in one"
            yield Problem("error", kind, _many(files, "image", text))
        else:
            yield Problem("warning", kind, _many(files, "image", "there more than once"))


def _find_in_files(name: str, split: SplitFingerprint) -> Iterator[Problem]:
    texts: dict[str, tuple[Level, str, str]] = {
        "unreadable": ("error", "file", "that cannot be read"),
        "sizes": ("error", "mask", "of another size than the image"),
        "copy": ("warning", "mask", "with the very pixels of the image"),
        "jpeg": ("warning", "mask", "saved as JPEG, which blurs labels; export again as PNG"),
        "plain": ("warning", "image", "of one single colour"),
        "ignored": ("warning", "mask", "ignored altogether, which teaches nothing"),
    }
    for kind, (level, noun, text) in texts.items():
        if kind in split.files and not (kind == "ignored" and _nothing_labelled(split)):
            yield Problem(level, name, _many(split.files[kind], noun, text))
    if split.documented is not None and split.num_pairs != split.documented:
        message = f"{split.num_pairs} pairs were found, {split.documented} are documented"
        yield Problem("warning", name, f"{message}; was the archive unpacked completely?")
    if split.sizes and split.brightest < DARK:
        message = f"the brightest value of all images is {split.brightest} of 255"
        yield Problem("warning", name, f"{message}; save them with values from 0 to 255")
    if split.redrawn:
        code, colour, mask, other_colour, other_mask = split.redrawn[0]
        yield Problem(
            "warning",
            name,
            f"the value {code} is drawn in the colour {colour} in {mask}, but in {other_colour} in "
            f"{other_mask}: if colours say the class, give each its own in classes.txt, as "
            "`road 128 64 128`",
        )
    if split.num_masks == 1 < split.num_pairs:
        yield Problem("warning", name, f"all {split.num_pairs} masks are the same")


def _nothing_labelled(split: SplitFingerprint) -> bool:
    return not any(split.class_pixels) and not split.outside_pixels


def _find_in_labels(
    name: str, split: SplitFingerprint, class_names: tuple[str, ...]
) -> Iterator[Problem]:
    if split.outside_pixels:
        yield Problem("error", name, _outside_message(split, len(class_names)))
    seen = [class_names[i] for i, count in enumerate(split.class_pixels) if count]
    if _nothing_labelled(split):
        yield Problem("error", name, f"every pixel of all {split.num_pairs} masks is ignored")
    elif name == "train" and len(seen) == 1:
        message = f"{seen[0]} is the only class that occurs: there is nothing to tell apart"
        if set(split.codes) == {0, IGNORE}:
            # The commonest mistake with two classes: a mask that looks right in a viewer.
            message += (
                "; masks hold 0 and 255, and 255 means ignore: if it is your second class, set "
                "--data.label_map '{0: 0, 255: 1}'"
            )
        yield Problem("error", name, message)
    if MUCH_IGNORED < split.ignored_share < 1:
        message = f"{split.ignored_share:.0%} of the pixels are ignored"
        if split.codes.get(IGNORE, 0) > split.ignored_pixels / 2:  # and not translated to it
            message += "; is 255 meant as a class?"
        yield Problem("warning", name, message)


def _outside_message(split: SplitFingerprint, num_classes: int) -> str:
    """Returns what the codes without a class may come from."""
    codes = list(split.outside)
    share = split.outside_pixels / split.pixels
    values = [f"{code} in {found.pixels} px" for code, found in split.outside.items()]
    if len(codes) > MANY_CODES or "jpeg" in split.files:
        fix = (
            "such values come from JPEG, smooth scaling or a colour map; if they are labels, name "
            "all classes, or translate with --data.label_map"
        )
    elif codes == [num_classes] and 0 not in split.codes:
        fix = f"masks seem to count from 1 to {num_classes}: set --data.reduce_zero_label true"
    elif codes == [num_classes] and max(split.codes.keys() - {IGNORE}) == num_classes:
        own = ", ".join(f"{i}: {i}" for i in range(num_classes))
        fix = (
            f"masks hold 0 to {num_classes}, one value more than there are classes: if "
            f"{num_classes} is void, set --data.label_map '{{{own}, {num_classes}: 255}}'; if 0 is "
            "void, --data.reduce_zero_label true; else name the class that has no name"
        )
    else:
        fix = "correct the masks or the class names, or translate with --data.label_map"
    text = (
        f"with values that are neither one of the {num_classes} classes nor 255 "
        f"({few(values, most=8)}), {share:.2%} of the pixels; {fix}"
    )
    return _many(split.files["outside"], "mask", text)


def _find_missing_classes(fingerprint: Fingerprint) -> Iterator[Problem]:
    names = fingerprint.class_names
    train = fingerprint.splits["train"]
    if _nothing_labelled(train):
        return
    never = [i for i, count in enumerate(train.class_pixels) if not count]
    if never:
        message = f"never seen, so never learnt: {few([names[i] for i in never], most=10)}"
        if never[0] == 0 and 0 not in train.codes:
            message += "; do the masks count from 1? --data.reduce_zero_label true"
        yield Problem("warning", "train", message)
    for name, split in fingerprint.splits.items():
        absent = [names[i] for i, n in enumerate(split.class_pixels) if not n and i not in never]
        if name != "train" and absent and not _nothing_labelled(split):
            message = f"in train, but not here, so not evaluated: {few(absent, most=10)}"
            yield Problem("warning", name, message)
        unseen = [names[i] for i in never if split.class_pixels[i]]
        if unseen:
            message = f"in here, but not in train, so always wrong: {few(unseen, most=10)}"
            yield Problem("warning", name, message)
