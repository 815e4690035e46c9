"""What a training says of its network at the start."""

import copy
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from isanet_pl.inference import gmacs_of_children
from isanet_pl.models import ISANet


class NetworkSummary(ModelSummary):
    """Prints the parts of the network with their parameters and arithmetic.

    In the place of Lightning's own, which shows the module's four children, of which one has
    parameters, and knows their arithmetic only from a batch in the module.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves Lightning's table out; the size of a training image is not known yet."""
        self.printed = False

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prints the table before the first batch, for an image of its size."""
        network = pl_module.network
        if self.printed or not isinstance(network, ISANet):
            return
        self.printed = True
        table = _table(network, *batch["image"].shape[2:])
        Console(width=None if sys.stdout.isatty() else 80).print(table)


def gmacs_of_parts(network: ISANet, height: int, width: int) -> dict[str, float]:
    """Returns the arithmetic of each part of a network in the forward pass of a training image.

    In billions of multiply-adds, counted as in `Inference.count_gmacs`, which has no auxiliary
    head. Nothing is computed for it.

    Args:
        network: The network; it stays as it is.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
    """
    shapes: Any = copy.deepcopy(network).to("meta").train()  # with the auxiliary head
    for module in shapes.modules():
        # In training it wants several values of a channel, and on several GPUs all processes.
        if isinstance(module, _BatchNorm):
            module.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes(torch.empty(1, 3, height, width, device="meta"))
    return gmacs_of_children(counter, shapes)


def _table(network: ISANet, height: int, width: int) -> Table:
    gmacs = gmacs_of_parts(network, height, width)
    parameters = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in network.named_children()
    }
    kinds = {name: str(network.arguments[name]) for name in ("backbone", "context")}
    table = Table(title=f"ISANet, images of {height}x{width}", title_justify="left")
    table.add_column("part")
    table.add_column("M parameters", justify="right")
    table.add_column("GMACs", justify="right")
    for name in gmacs:
        if parameters[name]:
            label = f"{name} {kinds.get(name, '')}".rstrip()
            table.add_row(label, f"{parameters[name]:.2f}", f"{gmacs[name]:.2f}")
    table.add_section()
    table.add_row("all", f"{sum(parameters.values()):.2f}", f"{sum(gmacs.values()):.2f}")
    return table
