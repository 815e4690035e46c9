"""The trainer of the command line: Lightning's, which can export a network as well."""

import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from isanet_pl.checkpoint_io import read_checkpoint
from isanet_pl.errors import InputError
from isanet_pl.export import (
    compare,
    input_of,
    least_windows,
    quantise,
    read_images,
    size_multiples,
    trace,
    write_onnx,
)
from isanet_pl.exported import METADATA, onnx_runner, require_onnx
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet, fuse_for_inference

NUM_REAL = 3  # images of the user's that results are compared on

log = logging.getLogger(__name__)


def _described(method: Callable[..., Any], line: str) -> Callable[..., Any]:
    """Returns a method of Lightning's trainer with a first line for the help of its command.

    What its arguments are follows in its own words. Of several sentences, help would cut the last.
    """

    @functools.wraps(method)
    def call(self: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    _, _, rest = str(method.__doc__).partition("\n\n")
    call.__doc__ = f"{line}\n\n{rest}"
    return call


class SegmentationTrainer(pl.Trainer):
    """Lightning's trainer, which can export as well."""

    fit = _described(pl.Trainer.fit, "Trains a network, and validates it now and then.")
    validate = _described(pl.Trainer.validate, "Scores a trained network on the validation images.")
    test = _described(pl.Trainer.test, "Scores a trained network on the test images.")
    predict = _described(pl.Trainer.predict, "Segments a folder of images with a trained network.")

    def export(
        self,
        model: Any,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        path: str = "model.onnx",
        size: tuple[int, int] | None = None,
        dynamic: bool = False,
        normalise: Literal["inside", "outside"] = "inside",
        images: str | None = None,
        int8: bool = False,
        num_calibration: int = 64,
        weights_only: bool | None = None,
    ) -> None:
        """Writes a network, without its auxiliary head, into a file and checks the file.

        Args:
            model: The module.
            datamodule: Not used.
            ckpt_path: The weights.
            path: File to write: NAME.onnx, or NAME.pt2 for a torch.export archive.
            size: Height and width of its images; null: of the checkpoint's windows, or 512x1024
                where it has none. The batch is free in any case.
            dynamic: Let height and width be free as well, in multiples of stride times window.
                Other images are padded to such multiples, which a checkpoint does only if told
                to: its `inference.pad_multiple`.
            normalise: `inside`: the file takes uint8 RGB (N, 3, H, W). `outside`: it takes them as
                float32, minus mean, divided by std.
            images: Folder of real images to compare results on, and to calibrate int8 with.
            int8: Quantise to int8 (onnxruntime, static); needs `images`.
            num_calibration: Images to calibrate with.
            weights_only: Not used; a run's config.yaml has it.

        Raises:
            InputError: The options do not go together, or the file gives other results.
        """
        assert ckpt_path is not None
        checkpoint = read_checkpoint(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        network = model.network.float().eval()
        target = Path(path)
        least = least_windows(target) if dynamic else None
        if size is None:
            size = _default_size(network, model.inference, least)
        _check_options(network, target, size, least, images, int8, num_calibration)
        takes_uint8 = normalise == "inside"
        metadata = {
            **model.description(),
            "size": None if dynamic else list(size),
            "stride": network.output_stride,
            "multiples": list(size_multiples(network)),
            "normalise": normalise,
        }
        real = [] if images is None else read_images(Path(images), size, num_calibration)
        inputs = [torch.randint(256, (2, 3, *size), dtype=torch.uint8), *real[:NUM_REAL]]
        with _checked_first(target) as file:
            program = trace(fuse_for_inference(network), size, least, takes_uint8)
            if target.suffix == ".onnx":
                write_onnx(program, file, metadata)
                if int8:
                    quantise(file, [input_of(x, network, takes_uint8) for x in real])
                run = onnx_runner(file)
            else:
                text = json.dumps(metadata)
                torch.export.save(program, file, extra_files={f"{METADATA}.json": text})
                run = torch.export.load(file).module()
            compare(file, network, run, inputs, takes_uint8, exact=not int8)
        left = _left_to_the_user(model.inference)
        if left:
            log.info("the network was made for %s: the file leaves that to its user", left)


def _default_size(network: ISANet, inference: Inference, least: int | None) -> tuple[int, int]:
    """Returns the (H, W) to export for if none is given; see `trace` for `least`."""
    window = inference.crop_size if inference.mode == "slide" else None
    size = window or (512, 1024)
    if least is None:
        return size
    h, w = (  # a size that a file for any size takes
        step * max(least, -(-edge // step))
        for edge, step in zip(size, size_multiples(network), strict=True)
    )
    return h, w


def _left_to_the_user(inference: Inference) -> str:
    """Returns what a network's scores need besides the network, in words; empty: nothing."""
    parts = []
    if inference.base_size is not None:
        parts.append(f"images scaled to fit {tuple(inference.base_size)} (long and short edge)")
    if inference.mode == "slide":
        parts.append(f"windows of {inference.crop_size}, {inference.window_stride} apart")
    if list(inference.scales) != [1.0] or inference.flip:
        mirrored = ", mirrored too" if inference.flip else ""
        parts.append(f"views at {list(inference.scales)} times the size{mirrored}")
    return " and ".join(parts)


def _check_options(
    network: ISANet,
    target: Path,
    size: Sequence[int],
    least: int | None,
    images: str | None,
    int8: bool,
    num_calibration: int,
) -> None:
    """Refuses options of `export` that do not go together.

    Raises:
        InputError: See above.
    """
    if target.suffix not in (".onnx", ".pt2"):
        raise InputError(f"--path {target}: the name must end in .onnx or .pt2")
    if min(size) < 1:
        raise InputError(f"--size must be two positive integers, got {tuple(size)}")
    if least is not None:
        multiples = size_multiples(network)
        if any(s % m for s, m in zip(size, multiples, strict=True)):
            raise InputError(
                f"--dynamic true takes sizes in multiples of {multiples} (stride times window): "
                f"--size {tuple(size)} is none"
            )
        smallest = tuple(least * m for m in multiples)
        if any(s < m for s, m in zip(size, smallest, strict=True)):
            raise InputError(
                f"--dynamic true in a {target.suffix} file takes sizes from {smallest} on, two "
                f"windows a side: got {tuple(size)}"
            )
    if int8 and (target.suffix != ".onnx" or images is None):
        raise InputError("--int8 true needs an .onnx file and --images DIR to calibrate with")
    if target.suffix == ".onnx":
        require_onnx()
    if least is not None and target.suffix == ".onnx" and network.arguments["ceil_mode"]:
        raise InputError(
            "--dynamic true cannot write an .onnx file of a network with ceil_mode, whose "
            "windows need padding at every size: use --dynamic false, or a .pt2 file"
        )
    if num_calibration < 1:
        raise InputError(f"--num_calibration must be 1 or more: {num_calibration}")


@contextmanager
def _checked_first(target: Path) -> Iterator[Path]:
    """Yields a place for a file, which goes to its own if nothing is raised.

    Raises:
        InputError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export_", dir=target.parent) as folder:
            file = Path(folder, target.name)
            yield file
            file.replace(target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; choose another --path"
        ) from error
