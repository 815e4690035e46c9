"""From an image of any size to class scores at that size: whole, by sliding windows, averaged."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Mode = Literal["whole", "slide"]


class Network(Protocol):
    """What a network must offer; `ISANet` does."""

    align_corners: bool
    output_stride: int

    def normalise(self, image: Tensor) -> Tensor:
        """Returns the float input of the network for uint8 images (N, 3, H, W)."""
        ...

    def __call__(self, x: Tensor) -> Mapping[str, Tensor]:
        """Returns, as `out`, logits (N, K, H, W) at the size of the input (N, 3, H, W)."""
        ...


def fit_scale(size: Sequence[int], base_size: Sequence[int] | None) -> float:
    """Returns the factor that makes an image as large as fits into the base size.

    Args:
        size: (H, W) of the image.
        base_size: (long, short) edge, whichever way up the image is; None: the factor is 1.
    """
    if base_size is None:
        return 1.0
    return min(max(base_size) / max(size), min(base_size) / min(size))


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns where windows start along an axis; the last one ends with the axis."""
    steps = max(0, math.ceil((length - crop) / stride))
    return [max(0, min(i * stride, length - crop)) for i in range(steps + 1)]


@dataclass(frozen=True)
class Inference:
    """Returns class scores of images of any size, in the protocols of the field.

    The image is scaled to `base_size`, if one is given, and then by each of `scales`; the network
    sees it whole or by windows; the scores are resized to the image's own size. With several
    scales or a flip, the probabilities of all views are averaged (mmsegmentation's `SegTTAModel`).

    Args:
        mode: `whole`: the network sees the image at once. `slide`: windows of `crop_size`, the last
            of each row and column shifted back into the image; logits are averaged where windows
            overlap (mmsegmentation's `slide_inference`). Its memory does not grow with the number
            of windows.
        crop_size: Height and width of a window.
        stride: Steps down and across from one window to the next; None: two thirds of `crop_size`.
        scales: Each view's size, as a factor; the field's multi-scale protocol is
            [0.5, 0.75, 1, 1.25, 1.5, 1.75].
        flip: Average with the mirrored image as well.
        pad_multiple: Pad the image, or each window, on the right and at the bottom, to a multiple
            of this, and crop the logits. None: the network's output stride, so that features lie
            as they did under training crops; but with `align_corners`, which is exact for
            multiples plus one, nothing. 1 pads nothing, as in mmsegmentation.
        base_size: (long, short) edge that images are scaled to; the command line takes it from the
            data.
        mirrored_classes: Pairs of classes that a flip turns into each other; the command line takes
            them from the data.

    Raises:
        ValueError: A size or factor is not positive, or `slide` lacks its `crop_size`.
    """

    mode: Mode = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    pad_multiple: int | None = None
    base_size: tuple[int, int] | None = None
    mirrored_classes: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"inference.mode is one of {get_args(Mode)}, got {self.mode!r}")
        if self.mode == "slide" and self.crop_size is None:
            raise ValueError("inference.mode slide needs inference.crop_size, such as [769, 769]")
        for name in ("crop_size", "stride", "base_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"inference.{name} must be two positive integers, got {size}")
        if self.crop_size and any(
            s > c for s, c in zip(self.window_stride, self.crop_size, strict=True)
        ):
            raise ValueError(
                f"inference.stride {self.stride} is larger than crop_size {self.crop_size}: the "
                "windows would leave gaps"
            )
        pad_multiple = 1 if self.pad_multiple is None else self.pad_multiple
        if not self.scales or min(self.scales) <= 0 or pad_multiple < 1:
            raise ValueError(
                f"inference.scales and pad_multiple must be positive, got {list(self.scales)} and "
                f"{self.pad_multiple}"
            )

    @property
    def window_stride(self) -> tuple[int, int]:
        """Returns (H, W) from one window to the next."""
        assert self.crop_size is not None
        h, w = self.crop_size
        return self.stride or (max(1, h * 2 // 3), max(1, w * 2 // 3))

    def __call__(self, network: Network, image: Tensor) -> Tensor:
        """Returns logits (N, K, H, W), or, of several views, the logarithm of mean probabilities.

        Args:
            network: The network, in eval mode, on the image's device.
            image: (N, 3, H, W) uint8 RGB.
        """
        size = image.shape[2:]
        x = network.normalise(image)
        fitting = fit_scale(size, self.base_size)
        mirrors = (False, True) if self.flip else (False,)
        views = [(scale, mirror) for scale in self.scales for mirror in mirrors]
        total: Tensor | None = None
        for scale, mirror in views:
            view = _resize(x, fitting * scale)
            scores = self._scores(network, view.flip(-1) if mirror else view)
            if mirror:
                scores = self._mirror(scores)
            if scores.shape[2:] != size:
                scores = resize_logits(scores, size, network.align_corners)
            if len(views) == 1:
                return scores
            probabilities = scores.float().softmax(dim=1)
            total = probabilities if total is None else total.add_(probabilities)
        assert total is not None
        # A probability that rounds to zero must not become an infinite loss.
        return total.div_(len(views)).clamp_(min=1e-12).log_()

    def count_gmacs(self, network: nn.Module, height: int, width: int) -> float:
        """Returns the arithmetic of one image, in billions of multiply-adds; see `count_parts`."""
        return sum(self.count_parts(network, height, width).values())

    def count_parts(self, network: nn.Module, height: int, width: int) -> dict[str, float]:
        """Returns the arithmetic of one image in each part of a network, such as `context`.

        In billions of multiply-adds.

        Convs and matrix products count, those of the attention too, as in the papers; every view
        and window does. Nothing is computed for it. The network is taken as it is, not folded.

        Args:
            network: An ISANet.
            height: Of the image, in pixels.
            width: Of the image, in pixels.
        """
        shapes: Any = copy.deepcopy(network).to("meta").eval()
        image = torch.empty(1, 3, height, width, dtype=torch.uint8, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(shapes, image)
        return gmacs_of_children(counter, shapes)

    def multiple_for(self, network: Network) -> int:
        """Returns what the sides of an image, or a window, are padded to a multiple of."""
        if self.pad_multiple is None:
            return 1 if network.align_corners else network.output_stride
        return self.pad_multiple

    def _scores(self, network: Network, x: Tensor) -> Tensor:
        """Returns the logits of one view, at its size."""
        return self._slide(network, x) if self.mode == "slide" else self._padded(network, x)

    def _padded(self, network: Network, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        multiple = self.multiple_for(network)
        padding = (0, -w % multiple, 0, -h % multiple)
        if any(padding):
            x = F.pad(x, padding)  # zero is the mean colour
        return network(x)["out"][:, :, :h, :w]

    def _slide(self, network: Network, x: Tensor) -> Tensor:
        assert self.crop_size is not None
        n, _, h, w = x.shape
        count = torch.zeros(h, w, device=x.device)
        total: Tensor | None = None
        for top, left in self._corners(h, w):
            rows = slice(top, top + self.crop_size[0])
            columns = slice(left, left + self.crop_size[1])
            logits = self._padded(network, x[:, :, rows, columns])
            if total is None:
                total = torch.zeros(n, logits.shape[1], h, w, device=x.device)
            total[:, :, rows, columns] += logits
            count[rows, columns] += 1
        assert total is not None
        return total.div_(count)

    def _corners(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        assert self.crop_size is not None
        for top in window_starts(height, self.crop_size[0], self.window_stride[0]):
            for left in window_starts(width, self.crop_size[1], self.window_stride[1]):
                yield top, left

    def _mirror(self, scores: Tensor) -> Tensor:
        """Returns the scores of the unmirrored image."""
        order = list(range(scores.shape[1]))
        for left, right in self.mirrored_classes:
            order[left], order[right] = right, left
        return scores[:, order].flip(-1) if self.mirrored_classes else scores.flip(-1)


def gmacs_of_children(counter: FlopCounterMode, network: nn.Module) -> dict[str, float]:
    """Returns what a counter has seen in each child of a network, in billions of multiply-adds."""
    counts = counter.get_flop_counts()
    return {
        name: sum(counts.get(f"{type(network).__name__}.{name}", {}).values()) / 2e9
        for name, _ in network.named_children()
    }


def resize_logits(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Returns logits (N, K, H, W) at another size, bilinear, in fp32 at least.

    In bf16, which has 8 bits of mantissa, classes tie at many borders, and the first one wins.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def _resize(x: Tensor, factor: float) -> Tensor:
    """Returns images scaled by a factor; sizes are rounded as in mmcv's `rescale_size`."""
    h, w = x.shape[2:]
    size = (max(1, int(h * factor + 0.5)), max(1, int(w * factor + 0.5)))
    if size == (h, w):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
