"""Files that `isanet-pl export` wrote, in the place of a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isanet_pl.errors import InputError

METADATA = "isanet_pl"
"""Key of what a file says of itself."""

Run = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


def require_onnx() -> None:
    """Makes sure that the packages for ONNX are there.

    Raises:
        InputError: One is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed: pip install onnx onnxruntime onnxscript"
        ) from error


def onnx_runner(target: Path, device: torch.device = CPU) -> Run:
    """Returns a function from inputs to logits, of an ONNX file.

    Args:
        target: The file.
        device: Compute on this GPU, where onnxruntime has been built for them. Inputs and logits
            are on the CPU.
    """
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        # Not in TF32, which is its default, and changes the third digit of the logits.
        chosen = {"use_tf32": 0, "device_id": device.index or 0}
        providers.insert(0, ("CUDAExecutionProvider", chosen))
    session = onnxruntime.InferenceSession(str(target), options, providers=providers)
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


class OnnxNetwork(nn.Module):
    """Offers what `Inference` needs of a network, from an exported ONNX file.

    Args:
        path: The file.

    Raises:
        InputError: It is no file that `isanet-pl export` wrote.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        description = read_metadata(path)
        arguments = description["network"]
        self.class_names: list[str] = description["class_names"]
        self.align_corners = bool(arguments["align_corners"])
        self.size: list[int] | None = description["size"]
        # A file for one size pads to it by itself.
        self.output_stride = (
            1 if self.size else int(description.get("stride", arguments["output_stride"]))
        )
        self.multiples: list[int] = description["multiples"]
        self.inside = description["normalise"] == "inside"
        for name in ("mean", "std"):
            values = torch.tensor(arguments[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.path = path
        self.run: Run | None = None

    def normalise(self, image: Tensor) -> Tensor:
        """Returns normalised images, float (N, 3, H, W), of uint8 ones."""
        return (image.float() - self.mean) / self.std

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns `out`, the logits (N, K, H, W) of normalised images (N, 3, H, W).

        Raises:
            InputError: The images are larger than those that the file was made for.
        """
        h, w = x.shape[2:]
        height, width = self.size or (h + -h % self.multiples[0], w + -w % self.multiples[1])
        if h > height or w > width:
            raise InputError(
                f"the file takes images of {width}x{height} (width x height), not of {w}x{h}: set "
                f"--model.inference.mode slide --model.inference.crop_size '[{height}, {width}]' "
                "--model.inference.stride null"
            )
        x = F.pad(x, (0, width - w, 0, height - h)).cpu()
        if self.inside:
            x = (x * self.std.cpu() + self.mean.cpu()).round().clamp(0, 255).to(torch.uint8)
        if self.run is None:  # only now it is known on which device
            self.run = onnx_runner(self.path, self.mean.device)
        logits = self.run(x.contiguous())[:, :, :h, :w]
        return {"out": logits.to(self.mean.device)}


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns what `isanet-pl export` wrote about an ONNX file.

    Raises:
        InputError: It did not write this file.
    """
    require_onnx()
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        properties = {prop.key: prop.value for prop in model.metadata_props}
        description: dict[str, Any] = json.loads(properties[METADATA])
    except Exception as error:
        raise InputError(f"{path} was not written by isanet-pl export: {error!r}") from error
    return description
