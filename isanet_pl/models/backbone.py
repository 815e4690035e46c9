"""Dilated ResNets from timm, and the loading of their weights."""

import importlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isanet_pl.models.layers import SameConv, is_same_conv


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
log = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Returns the feature maps of the last two stages of a timm ResNet, dilated to a stride.

    Parameters carry timm's names, which are torchvision's for ResNet-18/34/50/101.

    Args:
        name: A timm ResNet: `resnet18`, `resnet34`, `resnet50`, `resnet101`, or the V1c variants
            with the deep stem of mmsegmentation, `resnet50c`, `resnet101c`.
        output_stride: Input pixels per feature position; strides beyond it become dilations.
        last_stage: The last residual stage to build, 1 to 4; 4 is the whole network.
        ceil_mode: Round the max-pool's size up, as the authors' backbone does.

    Attributes:
        channels: Channels of the two returned maps: the stage before the last, the last.
        loaded: Names of the parameters and buffers that `load` filled.

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
        before, last = net.feature_info.channels()
        self.channels: tuple[int, int] = (before, last)
        self.loaded: frozenset[str] = frozenset()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the maps of the stage before the last and of the last.

        Args:
            x: (N, 3, H, W) normalised RGB.
        """
        before, last = self.net(x)
        return before, last

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Copies what a state dict has for this network and logs what it does not have.

        Args:
            state: Tensors by name, in torchvision's or timm's names; any float dtype.
            source: Where they come from, for messages.

        Raises:
            ValueError: Nothing in `state` has a name of this network, or a shape differs.
        """
        own = self.net.state_dict()
        shared = {k: v for k, v in state.items() if k in own}
        if not shared:
            raise ValueError(
                f"{source} holds no weight of backbone {self.name}: it has {_some(state)}, "
                f"the backbone has {_some(own)}"
            )
        for key, value in shared.items():
            if value.shape != own[key].shape:
                raise ValueError(
                    f"{source}: {key} is {tuple(value.shape)}, but {tuple(own[key].shape)} in "
                    f"backbone {self.name}; choose the backbone that the file is for"
                )
        self.net.load_state_dict(shared, strict=False)
        self.loaded = frozenset(shared)
        missing = [k for k in own if k not in shared and not k.endswith("num_batches_tracked")]
        log.info(
            "backbone %s: loaded %d tensors from %s; initialised anew: %s; not used: %s",
            self.name,
            len(shared),
            source,
            _by_stage(missing),
            _by_stage([k for k in state if k not in own]),
        )

    def load_file(self, path: str | Path) -> None:
        """Loads a local weights file, whole or in part; see `load`.

        Args:
            path: A file that `torch.load(weights_only=True)` reads: a state dict, bare or under
                the key `state_dict` or `model`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no weights file, or does not fit; see `load`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"backbone weights not found: {path}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is not a PyTorch weights file, or is truncated: {error}"
            ) from error
        for wrapper in ("state_dict", "model"):
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
        self.load({k: v for k, v in content.items() if isinstance(v, Tensor)}, str(path))

    def load_pretrained(self) -> None:
        """Loads timm's default weights for this model; downloads them unless they are cached."""
        state = timm.create_model(self.name, pretrained=True).state_dict()
        self.load(state, f"timm's {self.name}")


def _some(names: Mapping[str, Tensor]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "") or "nothing"


def _by_stage(names: list[str]) -> str:
    """Returns counts such as "layer4 (29), fc (2)"."""
    stages = [name.split(".")[0] for name in names]
    return ", ".join(f"{s} ({stages.count(s)})" for s in dict.fromkeys(stages)) or "nothing"
