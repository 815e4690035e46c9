"""Trained networks as files for other run-times: ONNX, checked in onnxruntime, and torch.export."""

import functools
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from isanet_pl.checkpoint_io import read_checkpoint
from isanet_pl.data.files import IMAGE_SUFFIXES, list_files, read_image
from isanet_pl.errors import InputError
from isanet_pl.exported import METADATA, Run, onnx_runner, require_onnx
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet, fuse_for_inference

TOLERANCE = 1e-4  # of the largest logit
LARGEST = 8192  # edge of an image, for files that take any size
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
        real = [] if images is None else _read_images(Path(images), size, num_calibration)
        inputs = [torch.randint(256, (2, 3, *size), dtype=torch.uint8), *real[:NUM_REAL]]
        with _checked_first(target) as file:
            program = trace(fuse_for_inference(network), size, least, takes_uint8)
            if target.suffix == ".onnx":
                write_onnx(program, file, metadata)
                if int8:
                    quantise(file, [_input(x, network, takes_uint8) for x in real])
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


class Exportable(nn.Module):
    """Returns the logits (N, K, H, W) of images, as the exported files do."""

    def __init__(self, network: ISANet, takes_uint8: bool) -> None:
        super().__init__()
        self.network = network
        self.takes_uint8 = takes_uint8

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits.

        Args:
            image: (N, 3, H, W), uint8 RGB, or normalised float.
        """
        x = self.network.normalise(image) if self.takes_uint8 else image
        logits: Tensor = self.network(x)["out"]
        return logits


def size_multiples(network: ISANet) -> tuple[int, int]:
    """Returns what height and width must be multiples of, so that no window needs padding.

    With `ceil_mode` there is one position more on each side, and windows always need it.
    """
    stride = network.output_stride
    windows = network.arguments["context"] == "isa"
    factors = network.arguments["down_factors"] if windows else [(1, 1)]
    return (
        stride * math.lcm(*(int(dh) for dh, _ in factors)),
        stride * math.lcm(*(int(dw) for _, dw in factors)),
    )


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


def least_windows(target: Path) -> int:
    """Returns how many windows a side must have at least, in a file for any size.

    torch.export takes a side of one window for a side that is never another, ONNX does not mind.
    """
    return 1 if target.suffix == ".onnx" else 2


def trace(
    network: ISANet, size: Sequence[int], least: int | None, takes_uint8: bool
) -> ExportedProgram:
    """Returns the network as a graph.

    Args:
        network: In eval mode, on the CPU.
        size: (H, W) of its images, or of some of them.
        least: Free height and width, in the multiples of `size_multiples`, from so many of them on;
            None: leave them fixed.
        takes_uint8: Normalise images in the graph.

    Raises:
        InputError: The network cannot be traced with free sizes.
    """
    free: dict[int, Any] = {0: Dim("batch", min=1, max=1024)}
    if least is not None:
        multiples = size_multiples(network)
        for axis, (name, step) in enumerate(zip("hw", multiples, strict=True)):
            free[2 + axis] = step * Dim(name, min=least, max=LARGEST // step)
        # See `least_windows`.
        size = [max(s, 2 * step) for s, step in zip(size, multiples, strict=True)]
    example = torch.zeros(2, 3, *size, dtype=torch.uint8 if takes_uint8 else torch.float32)
    try:
        return torch.export.export(
            Exportable(network, takes_uint8), (example,), dynamic_shapes={"image": free}
        )
    except Exception as error:
        if least is None:
            raise
        raise InputError(
            f"this network cannot be exported for any size; use --dynamic false ({error})"
        ) from error


def write_onnx(program: ExportedProgram, target: Path, metadata: Mapping[str, Any]) -> None:
    """Writes an ONNX file, complete in itself, that says what it is."""
    onnx_program = torch.onnx.export(
        program, input_names=["image"], output_names=["logits"], dynamo=True, verbose=False
    )
    assert onnx_program is not None
    properties = onnx_program.model.metadata_props
    properties[METADATA] = json.dumps(metadata)
    properties["classes"] = ", ".join(metadata["class_names"])
    onnx_program.save(target, external_data=False)


def quantise(target: Path, inputs: Sequence[Tensor]) -> None:
    """Replaces an ONNX file by its int8 version, calibrated with inputs (1, 3, H, W)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.left, None)
            return None if x is None else {"image": x.numpy()}

    kept = {prop.key: prop.value for prop in onnx.load(target).metadata_props}
    # Weights of 7 bits: with 8, products overflow on CPUs without VNNI, onnxruntime says.
    options = {"per_channel": True, "reduce_range": True, "op_types_to_quantize": ["Conv"]}
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns about each model, whatever is done
    try:
        quantize_static(target, target, Reader(), **options)
    finally:
        root.setLevel(level)
    model = onnx.load(target)
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, target)


def _read_images(folder: Path, size: Sequence[int], count: int) -> list[Tensor]:
    """Returns images of a folder, evenly chosen, each resized to (1, 3, H, W) uint8."""
    files = list_files(folder, IMAGE_SUFFIXES, recursive=True)
    count = min(count, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    images = []
    for path in chosen:
        image = read_image(path)[None].float()
        image = F.interpolate(image, tuple(size), mode="bilinear", antialias=True)
        images.append(image.round().clamp(0, 255).to(torch.uint8))
    return images


def _input(image: Tensor, network: ISANet, takes_uint8: bool) -> Tensor:
    """Returns what an exported file takes for uint8 images."""
    return image if takes_uint8 else network.normalise(image).contiguous()


@torch.inference_mode()
def compare(
    file: Path,
    network: ISANet,
    run: Run,
    inputs: Sequence[Tensor],
    takes_uint8: bool,
    exact: bool,
) -> None:
    """Prints how results and latency of a file compare with PyTorch's.

    Args:
        file: The exported file.
        network: What was exported.
        run: Runs the file.
        inputs: uint8 images (N, 3, H, W): random ones, then real ones.
        takes_uint8: Whether the file normalises images itself.
        exact: Refuse results that differ by more than `TOLERANCE`.

    Raises:
        InputError: The file does not run, or the results differ.
    """
    differences, agreement = [], []
    for image in inputs:
        expected = network(network.normalise(image))["out"]
        try:
            found = run(_input(image, network, takes_uint8))
        except Exception as error:  # of onnxruntime's own classes
            raise InputError(
                f"{file.name} does not run on {tuple(image.shape)}: {error}"
            ) from error
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
        agreement.append(float((found.argmax(1) == expected.argmax(1)).float().mean()))
    worst = float(np.max(differences))  # NaN if one is
    one = inputs[0][:1]
    eager = _latency(lambda: network(network.normalise(one)))
    exported = _latency(lambda: run(_input(one, network, takes_uint8)))
    h, w = one.shape[2:]
    megabytes = file.stat().st_size / 1e6
    print(
        f"{file.name} ({megabytes:.1f} MB) against PyTorch on {len(inputs)} inputs: "
        f"logits within {worst:.1e} of the largest, {100 * np.mean(agreement):.3f} % of the pixels "
        f"in the same class\nlatency of one {h}x{w} image, {torch.get_num_threads()} threads: "
        f"{exported:.1f} ms, PyTorch {eager:.1f} ms"
    )
    if exact and not worst <= TOLERANCE:
        raise InputError(
            f"{file.name} gives other results than the network: the logits differ by {worst:.1e} "
            f"of the largest, {TOLERANCE:.0e} is allowed"
        )


def _latency(call: Callable[[], Any], repeats: int = 7) -> float:
    """Returns the median time of a call in milliseconds, after two to warm up."""
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])
