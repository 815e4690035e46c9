"""Trained networks as files for other run-times: ONNX, checked in onnxruntime, and torch.export."""

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from isanet_pl.data.files import IMAGE_SUFFIXES, list_files, read_image
from isanet_pl.errors import InputError
from isanet_pl.exported import METADATA, Run
from isanet_pl.models import ISANet

TOLERANCE = 1e-4  # of the largest logit
LARGEST = 8192  # edge of an image, for files that take any size


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


def read_images(folder: Path, size: Sequence[int], count: int) -> list[Tensor]:
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


def input_of(image: Tensor, network: ISANet, takes_uint8: bool) -> Tensor:
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
            found = run(input_of(image, network, takes_uint8))
        except Exception as error:  # of onnxruntime's own classes
            raise InputError(
                f"{file.name} does not run on {tuple(image.shape)}: {error}"
            ) from error
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
        agreement.append(float((found.argmax(1) == expected.argmax(1)).float().mean()))
    worst = float(np.max(differences))  # NaN if one is
    one = inputs[0][:1]
    eager = _latency(lambda: network(network.normalise(one)))
    exported = _latency(lambda: run(input_of(one, network, takes_uint8)))
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
