"""Dilated ResNets from timm."""

import importlib
import sys
from typing import Any, Literal

from torch import Tensor, nn

from isanet_pl.models.layers import SameConv, is_same_conv
from isanet_pl.models.weights import load_weights


def _import_timm() -> Any:
    """Returns timm, imported without wandb.

    timm imports wandb for its own training script wherever it is installed (timm/utils/summary.py),
    a second of start-up that nobody asked for. None in its place makes that import fail, as timm
    expects it to where wandb is not installed.
    """
    absent = "wandb" not in sys.modules
    if absent:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("timm")
    finally:
        if absent:
            del sys.modules["wandb"]


timm = _import_timm()


class Backbone(nn.Module):
    """Returns the feature maps of the last two stages of a timm ResNet, dilated to a stride.

    Parameters carry timm's names, which are torchvision's for ResNet-18/34/50/101.

    Args:
        name: A timm ResNet: `resnet18`, `resnet34`, `resnet50`, `resnet101`; the V1c variants with
            the deep stem of mmsegmentation, `resnet50c`, `resnet101c`; those with the authors'
            stem, twice as wide, `resnet50s`, `resnet101s`.
        output_stride: Input pixels per feature position at most; strides beyond it become
            dilations.
        last_stage: The last residual stage to build, 1 to 4; 4 is the whole network.
        ceil_mode: Round the max-pool's size up, as the authors' backbone does.

    Attributes:
        channels: Channels of the two returned maps: the stage before the last, the last.
        output_stride: Input pixels per position of the last map: with fewer stages perhaps less
            than was asked for.

    Raises:
        ValueError: timm has no such model, or it is not a ResNet.
    """

    def __init__(
        self,
        name: str = "resnet50",
        output_stride: Literal[8, 16, 32] = 8,
        last_stage: Literal[1, 2, 3, 4] = 4,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models("resnet*")[:8])
            raise ValueError(f"timm has no model named {name!r}; ResNets are: {near}, ...")
        if not timm.models.is_model_in_modules(name, {"resnet"}):
            raise ValueError(f"backbone {name!r} is not a ResNet; try resnet18 or resnet50")
        if output_stride not in (8, 16, 32) or last_stage not in (1, 2, 3, 4):
            raise ValueError(
                f"output_stride is 8, 16 or 32 and last_stage 1 to 4, got {output_stride} and "
                f"{last_stage}"
            )
        net: Any = timm.create_model(
            name,
            features_only=True,
            output_stride=output_stride,
            out_indices=(last_stage - 1, last_stage),
        )
        if ceil_mode:
            if not isinstance(net["maxpool"], nn.MaxPool2d):
                raise ValueError(f"backbone {name!r} has no max-pool to apply ceil_mode to")
            net["maxpool"].ceil_mode = True
        for conv in net.modules():
            if type(conv) is nn.Conv2d and is_same_conv(conv):
                conv.__class__ = SameConv  # the same conv with a faster gradient, where it stands
        self.name = name
        self.net: nn.Module = net
        self.output_stride: int = net.feature_info.reduction()[-1]
        before, last = net.feature_info.channels()
        self.channels: tuple[int, int] = (before, last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the maps of the stage before the last and of the last.

        Args:
            x: (N, 3, H, W) normalised RGB.
        """
        before, last = self.net(x)
        return before, last

    def load_pretrained(self) -> frozenset[str]:
        """Loads timm's default weights for this model; downloads them unless they are cached.

        Returns:
            The names in `net` of what was loaded.
        """
        state = timm.create_model(self.name, pretrained=True).state_dict()
        return load_weights(self.net, state, f"backbone {self.name}", f"timm's {self.name}")
