"""The network: backbone, ISA head, classifier, in its two forms."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from isanet_pl.agreement import different_arguments
from isanet_pl.errors import why_no_checkpoint
from isanet_pl.inference import Inference, resize_logits
from isanet_pl.models.attention import AttentionOrder, ISAModule
from isanet_pl.models.backbone import Backbone
from isanet_pl.models.context import (
    AtrousPyramid,
    DenseAttention,
    NoContext,
    PyramidPooling,
    RecurrentCrissCross,
)
from isanet_pl.models.layers import SameConv, activation, conv_bn_relu, upsample
from isanet_pl.models.weights import load_weights, read_weights, tensors_of
from isanet_pl.pixels import rgb_pixels

log = logging.getLogger(__name__)

Form = Literal["direct", "reduced"]
Context = Literal["isa", "none", "dense", "dense_sdpa", "ppm", "aspp", "rcca"]

OTHER_CONTEXTS: dict[str, type[nn.Module]] = {
    "none": NoContext,
    "ppm": PyramidPooling,
    "aspp": AtrousPyramid,
    "rcca": RecurrentCrissCross,
}

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@final
class ISANet(nn.Module):
    """Returns per-pixel class scores of an image, with ISA context (arXiv 1907.12273).

    Two forms, of which the second is the published one:

    - `direct`: the ISA module works straight on the backbone's channels; conv3x3 (with bias),
      BatchNorm, ReLU; bilinear to the input's size; conv3x3 classifier at full resolution. No
      auxiliary head.
    - `reduced` (mmsegmentation, and with other details the authors' code): conv3x3-BN-ReLU to
      `out_channels`, ISA module on these, conv1x1 classifier, bilinear to the input's size.
      Auxiliary FCN head on the stage before the last.

    Args:
        num_classes: K; the command line takes it from the data.
        backbone: A timm ResNet: resnet18, resnet34, resnet50, resnet101; with the deep stem of
            mmsegmentation resnet50c, resnet101c; with the authors' wider one resnet50s, resnet101s.
        output_stride: Input pixels per feature position; without the later stages it may be less.
        last_stage: The last residual stage of the backbone to build; 4 is the whole ResNet.
        pretrained: Load timm's ImageNet weights (downloads them).
        weights_path: Start from the weights in this local file: those of a backbone, whole or in
            part, or a checkpoint of this project, then of the whole network; classifiers of
            another number of classes start anew.
        form: `direct`, ISA on the backbone's channels, or `reduced`, a conv3x3 to `out_channels`
            first, as the authors' code and mmsegmentation have it.
        context: `isa`, or what it is compared with (models/context.py): `none`, an FCN; `dense`
            self-attention, its affinity stored, or `dense_sdpa`; `ppm` (PSPNet), `aspp`
            (DeepLabV3), `rcca` (CCNet).
        down_factors: One window (dh, dw) for each ISA block of the module.
        key_channels: Channels of key and query.
        value_channels: Channels of the value.
        out_channels: Channels of the context features and of the classifier's input.
        dropout: Probability of Dropout2d after the context module and in the auxiliary head; None:
            0.1 if reduced, else 0.
        aux_head: Build the auxiliary head; None: if reduced.
        aux_channels: Channels inside the auxiliary head (mmsegmentation 256, the authors 512).
        align_corners: Of the bilinear upsampling; None: if direct.
        classify_before_upsampling: Run the direct form's classifier on the small map, which is
            cheaper by the square of the stride; the reduced form always does so.
        order: The stages of ISA, the other way round, or one alone (ablations).
        mask_padding: Keep ISA's padded positions from being attended to; the reference does not.
        value_bias: Give ISA's value convs a bias, as mmsegmentation does and the authors do not;
            None: if reduced. Of ISA alone.
        context_first: Concatenate [context, input], as mmsegmentation does, instead of
            [input, context], as the authors do; None: if reduced. Of ISA alone.
        recompute: In training, compute a part of ISA once more in the backward pass instead of
            keeping it: half the memory of the block for a few per cent of the time. Of ISA alone.
        ceil_mode: Round the max-pool's size up (the authors' backbone).
        negative_slope: Of the head's activations below zero; 0 is ReLU. The authors' models with
            InPlaceABN have 0.01.
        mean: RGB mean that `normalise` subtracts, in 0..255.
        std: RGB standard deviation that `normalise` divides by, in 0..255.

    Attributes:
        arguments: What the network was built with, no default left open; a checkpoint keeps it.
        loaded: Names of the parameters and buffers that it took from a file.
        inference: How `predict` sees an image; whole, unless the checkpoint says otherwise.

    Raises:
        ValueError: An argument is out of its range, or a weights file does not fit.
        FileNotFoundError: `weights_path` does not exist.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        output_stride: Literal[8, 16, 32] = 8,
        last_stage: Literal[1, 2, 3, 4] = 4,
        pretrained: bool = False,
        weights_path: str | None = None,
        form: Form = "direct",
        context: Context = "isa",
        down_factors: Sequence[tuple[int, int]] = ((8, 8),),
        key_channels: int = 256,
        value_channels: int = 512,
        out_channels: int = 512,
        dropout: float | None = None,
        aux_head: bool | None = None,
        aux_channels: int = 256,
        align_corners: bool | None = None,
        classify_before_upsampling: bool = False,
        order: AttentionOrder = "long_short",
        mask_padding: bool = False,
        value_bias: bool | None = None,
        context_first: bool | None = None,
        recompute: bool = True,
        ceil_mode: bool = False,
        negative_slope: float = 0.0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        arguments = {k: v for k, v in dict(locals()).items() if k not in ("self", "__class__")}
        # As a config has them, that a checkpoint is compared with: 1 and 1.0 are one number.
        arguments |= {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        super().__init__()
        _check(arguments)
        reduced = form == "reduced"
        of_form = {
            "dropout": 0.1 if reduced else 0.0,
            "aux_head": reduced,
            "align_corners": not reduced,
            "value_bias": reduced,
            "context_first": reduced,
        }
        arguments |= {name: value for name, value in of_form.items() if arguments[name] is None}
        self.arguments = arguments
        self.loaded: frozenset[str] = frozenset()
        self.inference = Inference()
        self.align_corners: bool = arguments["align_corners"]
        self.classify_before_upsampling = reduced or classify_before_upsampling
        for name in ("mean", "std"):
            values = torch.tensor(arguments[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

        self.backbone = Backbone(backbone, output_stride, last_stage, ceil_mode)
        self.output_stride = self.backbone.output_stride
        self._build_heads(reduced)
        self._initialise_heads(reduced)

        if pretrained and weights_path is not None:
            raise ValueError(
                "weights_path takes the place of ImageNet's weights: with it, set pretrained to "
                "false (--model.network.pretrained false)"
            )
        if weights_path is not None:
            self.load_file(weights_path)
        if pretrained:
            self.loaded = _of_backbone(self.backbone.load_pretrained())

    def _build_heads(self, reduced: bool) -> None:
        """Builds what follows the backbone, in the order in which weights are drawn."""
        num_classes, width, aux_width, dropout, slope = (
            self.arguments[name]
            for name in ("num_classes", "out_channels", "aux_channels", "dropout", "negative_slope")
        )
        before_channels, channels = self.backbone.channels
        self.reduce: nn.Module = nn.Identity()
        if reduced:
            self.reduce = conv_bn_relu(channels, width, 3, slope)
            channels = width
        self.context = _context_module(channels, self.output_stride, self.arguments)
        self.project: nn.Module = nn.Identity()
        if reduced:
            self.classifier = nn.Conv2d(width, num_classes, 1)
        else:
            # The direct form gives its 3x3 convs a bias, also before BatchNorm.
            self.project = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), activation(slope)
            )
            self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)
        self.aux_head: nn.Sequential | None = None
        if self.arguments["aux_head"]:
            self.aux_head = nn.Sequential(
                *conv_bn_relu(before_channels, aux_width, 3, slope),
                nn.Dropout2d(dropout),
                nn.Conv2d(aux_width, num_classes, 1),
            )

    def _initialise_heads(self, reduced: bool) -> None:
        """Draws first weights of classifiers and, in the reduced form, of the convs before them."""
        # Both as in mmsegmentation; the authors' code keeps PyTorch's defaults.
        if reduced:
            for head in filter(None, (self.reduce, self.context, self.aux_head)):
                for conv in head.modules():
                    if isinstance(conv, SameConv):
                        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for classifier in (self.classifier, *(self.aux_head or ())[-1:]):
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def load_file(self, path: str | Path) -> None:
        """Takes what a weights file has for the network, and logs what it lacks.

        Args:
            path: Either a state dict of the backbone, bare or under the key `state_dict` or
                `model`, in torchvision's, timm's or mmsegmentation's names, of any float dtype; or
                a checkpoint of `isanet-pl fit` or scripts/convert_checkpoint.py. Of its network,
                classifiers of another number of classes are left out.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no weights file, has nothing for the network, or has other
                shapes.
        """
        content = read_weights(path)
        parameters = content.get("hyper_parameters")
        saved = parameters.get("network") if isinstance(parameters, Mapping) else None
        if not isinstance(saved, Mapping):
            state, name = tensors_of(content), f"backbone {self.backbone.name}"
            if any("decode_head." in key or "isa_head." in key for key in state):
                raise ValueError(
                    f"{path} is a network of mmsegmentation or openseg: make a checkpoint of it "
                    "with scripts/convert_checkpoint.py, which can be given here"
                )
            state = {_timm_name(key): value for key, value in state.items()}
            self.loaded = _of_backbone(load_weights(self.backbone.net, state, name, str(path)))
            return
        state = _of_network(tensors_of(content))
        if saved.get("num_classes") != self.arguments["num_classes"]:
            state = {k: v for k, v in state.items() if not k.startswith(self._classifiers())}
        free = ["num_classes", "aux_head"]
        if not (saved.get("aux_head") and self.aux_head is not None):
            free.append("aux_channels")
        heads = {name: self.arguments[name] for name in free}
        others = "; ".join(different_arguments({**saved, **heads}, self.arguments))
        try:
            self.loaded = load_weights(self, state, "the network", str(path))
        except ValueError as error:
            raise ValueError(f"{error}; {others or 'the file is damaged'}") from error
        if others:
            log.warning("%s was trained in another network: %s", path, others)

    def _classifiers(self) -> tuple[str, ...]:
        """Returns the beginnings of the names whose tensors have the size of the classes."""
        aux = () if self.aux_head is None else (f"aux_head.{len(self.aux_head) - 1}.",)
        return ("classifier.", *aux)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns logits at the input's size, in torchvision's convention.

        Args:
            x: (N, 3, H, W) float, normalised RGB (see `normalise`).

        Returns:
            `out`: (N, K, H, W) logits; in training mode also `aux`, the same of the auxiliary
            head, where there is one.
        """
        size = x.shape[2:]
        before, features = self.backbone(x)
        features = self.project(self.context(self.reduce(features)))
        if self.classify_before_upsampling:
            logits = resize_logits(self.classifier(features), size, self.align_corners)
        else:
            logits = self.classifier(upsample(features, size, self.align_corners))
        outputs = {"out": logits}
        if self.training and self.aux_head is not None:
            outputs["aux"] = resize_logits(self.aux_head(before), size, self.align_corners)
        return outputs

    def normalise(self, image: Tensor) -> Tensor:
        """Returns what `forward` takes: float, minus `mean`, divided by `std`, channels_last.

        Args:
            image: (N, 3, H, W) uint8 RGB, on the network's device.
        """
        x = (image.to(self.mean.dtype) - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()  # and not `inference_mode`, whose tensors nobody may change
    def predict(self, image: Image.Image | Tensor) -> Tensor:
        """Returns the class map (H, W) of one image, uint8, on the CPU. Sets eval mode.

        Args:
            image: A PIL image in any mode, or a uint8 (3, H, W) RGB tensor. Its pixels are taken as
                they are stored: a photograph may need `PIL.ImageOps.exif_transpose` first.

        Raises:
            ValueError: The tensor is not uint8 (3, H, W).
        """
        pixels = rgb_pixels(image) if isinstance(image, Image.Image) else image
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(
                f"predict takes a PIL image or a uint8 (3, H, W) tensor, "
                f"got {pixels.dtype} {tuple(pixels.shape)}"
            )
        self.eval()
        scores = self.inference(self, pixels[None].to(self.mean.device))
        return scores[0].argmax(dim=0).to(torch.uint8).cpu()

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "ISANet":
        """Returns the trained network, in eval mode, from a checkpoint of `isanet-pl fit` alone.

        Args:
            path: The checkpoint. It is read with `weights_only`: nothing in it is executed.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no checkpoint of this project.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint not found: {path}")
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            saved: dict[str, Any] = checkpoint["hyper_parameters"]
            arguments, state = dict(saved["network"]), _of_network(checkpoint["state_dict"])
        except Exception as error:
            raise ValueError(why_no_checkpoint(path, error)) from error
        try:
            network = cls(**arguments)
            network.load_state_dict(state)
            network.inference = Inference(**saved.get("inference", {}))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} is not a checkpoint of isanet-pl as it is now, but damaged or of another "
                f"version: {reason}"
            ) from error
        return network.eval().to(memory_format=torch.channels_last)  # as `normalise` gives images


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises the class's ValueError, for what its parts do not check themselves."""
    num_classes, form, context = (arguments[key] for key in ("num_classes", "form", "context"))
    if not 2 <= num_classes <= 254:
        raise ValueError(f"num_classes must be 2 to 254 (masks are uint8), got {num_classes}")
    if form not in get_args(Form) or context not in get_args(Context):
        raise ValueError(
            f"form is one of {get_args(Form)} and context one of {get_args(Context)}, got "
            f"{form!r} and {context!r}"
        )
    for name in ("key_channels", "value_channels", "out_channels", "aux_channels"):
        if arguments[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {arguments[name]}")
    for name in ("value_bias", "context_first"):
        if context != "isa" and arguments[name] not in (None, form == "reduced"):
            raise ValueError(f"{name} is of ISA alone: leave it null with context {context}")


def _context_module(channels: int, stride: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Returns the context module that a network's arguments name.

    Args:
        channels: Of its input.
        stride: Input pixels per position of its input.
        arguments: Of the network.
    """

    def taken(*names: str) -> dict[str, Any]:
        return {name: arguments[name] for name in names}

    common = taken("out_channels", "dropout", "negative_slope")
    context = arguments["context"]
    if context == "isa":
        attention = taken("key_channels", "value_channels", "down_factors", "order")
        ports = taken("mask_padding", "value_bias", "context_first", "recompute")
        return ISAModule(channels, **attention, **ports, **common)
    if context in ("dense", "dense_sdpa"):
        return DenseAttention(
            channels, **taken("key_channels"), **common, sdpa=context == "dense_sdpa"
        )
    if context == "aspp":  # the paper's for stride 8, and half of these for 16
        common["dilations"] = [1, *(8 * d // stride for d in (12, 24, 36))]
    return OTHER_CONTEXTS[context](channels, **common)


def _timm_name(key: str) -> str:
    """Returns timm's name of a backbone's tensor; mmsegmentation names deep stems otherwise."""
    if key.startswith("stem.7."):
        return key.replace("stem.7.", "bn1.", 1)
    return key.replace("stem.", "conv1.", 1) if key.startswith("stem.") else key


def _of_backbone(names: Iterable[str]) -> frozenset[str]:
    """Returns the names in the network of what has these names in timm's model."""
    return frozenset(f"backbone.net.{name}" for name in names)


def _of_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the network's part of the state dict of a LightningModule."""
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
