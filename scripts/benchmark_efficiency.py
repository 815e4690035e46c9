"""Measures ISA against its plain formulation and against other context modules, in one process.

python scripts/benchmark_efficiency.py --train --networks --output docs/efficiency

For each form of the head, context module and size of its input: parameters, multiply-adds, peak
memory, what training keeps for the backward pass, and the latency of inference and, with --train,
of a training step; then how cost grows with the size of the map and with the window; and whole
networks. Writes CSV, JSON, Markdown and PNG; what --output holds already, from the same machine, is
kept, so that the measurement can be made in several runs. On a CPU, most of what temporaries cost
is the system's handing out of memory: run it once as it is, and once with jemalloc (see
docs/running.md), which shows the arithmetic.
"""

import argparse
import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from benchmarking.measuring import (
    alternate,
    conv_ceiling,
    gmacs,
    machine,
    peak_mib,
    saved_mib,
    spread,
)
from benchmarking.record import KEYS, headline, keep, short_markdown, write
from benchmarking.tables import DENSE, PEER, PLAIN, Row
from reporting.blocks import has_block, write_block
from rich.progress import track
from torch import Tensor, nn

from isanet_pl.models import ISABlock, ISAModule, ISANet, fuse_for_inference
from isanet_pl.models.context import (
    AtrousPyramid,
    DenseAttention,
    NoContext,
    PyramidPooling,
    RecurrentCrissCross,
)
from isanet_pl.models.layers import SameConv, conv_bn_relu
from isanet_pl.models.plain import plain_forward

WIDTHS = (256, 512, 512)  # key, value, output
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Plain(nn.Module):
    """Returns what an ISA module returns, computed as it is published; NCHW, as it is used."""

    def __init__(self, module: ISAModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features of a map."""
        return plain_forward(self.module, x)


def heads(form: str) -> dict[str, nn.Module]:
    """Returns the heads to compare, from 2048 channels to 512: direct, or after a conv3x3."""
    channels = 2048 if form == "direct" else 512
    modules: dict[str, nn.Module] = {
        "ISA": ISAModule(channels, *WIDTHS),
        PLAIN: Plain(ISAModule(channels, *WIDTHS)),
        DENSE: DenseAttention(channels, WIDTHS[0], WIDTHS[2]),
        "dense attention, SDPA": DenseAttention(channels, WIDTHS[0], WIDTHS[2], sdpa=True),
        "long range alone": ISAModule(channels, *WIDTHS, order="long"),
        "short range alone": ISAModule(channels, *WIDTHS, order="short"),
        "short range, then long": ISAModule(channels, *WIDTHS, order="short_long"),
        "RCCA": RecurrentCrissCross(channels, 512),
        "PPM": PyramidPooling(channels, 512),
        "ASPP": AtrousPyramid(channels, 512),
        "none": NoContext(channels, 512),
    }
    if form == "reduced":
        reduction = conv_bn_relu(2048, 512, 3)
        modules = {k: nn.Sequential(copy.deepcopy(reduction), m) for k, m in modules.items()}
        if has_mmsegmentation():
            modules[PEER] = _mmsegmentation()
    return modules


def has_mmsegmentation() -> bool:
    """Returns whether mmsegmentation is installed (scripts/setup_peer.sh).

    If so, makes it importable without mmcv's compiled operators.
    """
    if importlib.util.find_spec("mmseg") is None:
        return False

    class Operators(ModuleType):
        """Stands for mmcv's compiled operators, which ISANet does without but mmseg imports."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules.setdefault("mmcv.ops", Operators("mmcv.ops"))
    return True


def _mmsegmentation() -> nn.Module:
    from mmseg.models.decode_heads import ISAHead

    class Features(ISAHead):  # type: ignore[misc]
        """Returns the features that its classifier gets."""

        def cls_seg(self, features: Tensor) -> Tensor:
            return features

        def forward(self, x: Tensor) -> Any:
            return super().forward([x])

    return Features(
        in_channels=2048, channels=512, isa_channels=256, down_factor=(8, 8), num_classes=19,
        in_index=0, norm_cfg={"type": "BN"}, dropout_ratio=0.0,
    )  # fmt: skip


def is_plain(name: str) -> bool:
    """Returns whether a head is run as others publish it: NCHW, not folded."""
    return name in (PLAIN, PEER)


def prepare(name: str, module: nn.Module, x: Tensor, train: bool) -> tuple[nn.Module, Tensor]:
    """Returns a head and its input as they are run."""
    if is_plain(name):
        for conv in module.modules():
            if isinstance(conv, SameConv):  # whose gradients are this project's
                conv.__class__ = nn.Conv2d  # type: ignore[assignment]
        return module.train(train), x
    x = x.contiguous(memory_format=torch.channels_last)
    module = module if train else fuse_for_inference(module)
    return module.to(memory_format=torch.channels_last).train(train), x


def measure_heads(
    args: argparse.Namespace, dtype_name: str, form: str, size: tuple[int, int]
) -> list[Row]:
    """Returns a row for each head, for inference and perhaps for training."""
    device, dtype = args.device, DTYPES[dtype_name]
    rows: list[Row] = []
    modules = {k: m for k, m in heads(form).items() if not args.only or k in args.only}
    for mode in ("inference", "training") if args.train else ("inference",):
        train = mode == "training"
        batch = 2 if train else 1
        if train and size[0] * size[1] > args.largest_training**2:
            continue
        calls: dict[str, Callable[[], object]] = {}
        facts: dict[str, Row] = {}
        inputs = torch.randn(batch, 2048, *size, device=device)
        ceiling = conv_ceiling(inputs, dtype)
        for name, module in modules.items():
            ready, x = prepare(name, copy.deepcopy(module).to(device), inputs, train)
            x = x.to(dtype)  # as a backbone under autocast hands it over
            ready = ready if train else ready.to(dtype)
            call = _training_step(ready, x, dtype) if train else _inference(ready, x)
            facts[name] = {
                "parameters": sum(p.numel() for p in module.parameters()),
                "gmacs": gmacs(_inference(copy.deepcopy(ready).to(dtype).eval(), x)) / batch,
                "peak_mib": peak_mib(call, device),
                "saved_mib": _saved(ready, x, dtype) if train else None,
            }
            calls[name] = call
        measured = alternate(calls, args.rounds, args.warmup, device)
        ceiling = max(ceiling, conv_ceiling(inputs, dtype))  # before and after
        for name, times in measured.items():
            work = facts[name]["gmacs"] * batch * (3 if train else 1)
            share = work / (spread(times)["min"] / 1000) / ceiling
            rows.append(
                {"heap": heap(device), "form": form, "size": f"{size[0]}x{size[1]}", "mode": mode,
                 "batch": batch, "dtype": dtype_name, "head": name, **facts[name], **spread(times),
                 "ceiling_share": share}
            )  # fmt: skip
    return rows


def _inference(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return module(x)

    return call


def _training_step(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    x = x.detach().requires_grad_()

    def call() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out = module(x)
        out.float().sum().backward()
        x.grad = None
        module.zero_grad(set_to_none=True)

    return call


def _saved(module: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return saved_mib(module, x.detach().requires_grad_(), module)


def measure_growth(args: argparse.Namespace) -> list[Row]:
    """Returns the cost of the attention alone, on 512 channels, by size of map and window."""
    edges = args.growth
    cells = [("ISA", edge, 8) for edge in edges]
    cells += [(DENSE, edge, 1) for edge in edges if edge <= args.largest_dense]
    middle = 128 if 128 in edges else edges[-1]
    cells += [("window", middle, window) for window in (1, 2, 4, 8, 16, 32)]
    dtype = DTYPES[args.dtype[0]]
    rows = []
    for name, size, window in track(cells, "growth", transient=True):
        x = torch.randn(1, 512, size, size, device=args.device)
        if name == DENSE:
            block: nn.Module = DenseAttention(512, WIDTHS[0], WIDTHS[2]).attention
        else:
            block = ISABlock(512, *WIDTHS, down_factor=(window, window))
        ready, x = prepare(name, block, x, False)
        ready, x = ready.to(args.device, dtype), x.to(dtype)
        call = _inference(ready, x)
        rounds = max(3, args.rounds // 2)
        times = alternate({"call": call}, rounds, warmup=1, device=args.device)["call"]
        rows.append(
            {"heap": heap(args.device), "dtype": args.dtype[0], "kind": name, "size": size,
             "window": window, "gmacs": gmacs(call),
             "peak_mib": peak_mib(call, args.device), **spread(times)}
        )  # fmt: skip
    return rows


class Peer(nn.Module):
    """Returns what `ISANet` returns, by mmsegmentation's network with a ResNet-50."""

    def __init__(self) -> None:
        super().__init__()
        import mmseg
        from mmengine.config import Config
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import init_default_scope
        from mmseg.registry import MODELS

        init_default_scope("mmseg")
        folder = Path(mmseg.__file__).parent / ".mim/configs/_base_/models"
        config = Config.fromfile(folder / "isanet_r50-d8.py").model
        config.update(pretrained=None, data_preprocessor=None)
        self.model = revert_sync_batchnorm(MODELS.build(config))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns logits at the input's size; in training of the auxiliary head as well."""
        features = self.model.extract_feat(x)
        outputs = {"out": self.model.decode_head(features)}
        if self.training:
            outputs["aux"] = self.model.auxiliary_head(features)
        size = x.shape[2:]
        return {
            name: nn.functional.interpolate(logits, size, mode="bilinear")
            for name, logits in outputs.items()
        }


def measure_networks(args: argparse.Namespace) -> list[Row]:
    """Returns images/s of whole networks, in training and inference."""
    networks: dict[str, nn.Module] = {
        f"ISANet {name}": ISANet(19, name, form="reduced") for name in args.backbones
    }
    if has_mmsegmentation():
        networks["mmsegmentation's ISANet resnet50c"] = Peer()
    sizes = list(zip(args.network_sizes[::2], args.network_sizes[1::2], strict=True))
    rows = []
    for mode, size in track(
        [(mode, size) for mode in ("inference", "training") for size in sizes], "networks"
    ):
        batch = 2 if mode == "training" else 1
        calls = {
            name: _network_call(network, torch.randn(batch, 3, *size), mode, args)
            for name, network in networks.items()
        }
        for name, times in alternate(calls, args.network_rounds, 1, args.device).items():
            rows.append(
                {"heap": heap(args.device), "network": name, "size": f"{size[0]}x{size[1]}",
                 "mode": mode, "batch": batch, "dtype": args.dtype[-1],
                 "images_per_s": 1000 * batch / spread(times)["median"],
                 "peak_mib": peak_mib(calls[name], args.device), **spread(times)}
            )  # fmt: skip
    return rows


def _network_call(
    network: nn.Module, x: Tensor, mode: str, args: argparse.Namespace
) -> Callable[[], object]:
    """Returns a training step or an inference of a network, ours as it is deployed."""
    network, x = copy.deepcopy(network).to(args.device), x.to(args.device)
    dtype = DTYPES[args.dtype[-1]]
    if isinstance(network, ISANet):
        network = fuse_for_inference(network, dtype) if mode == "inference" else network
        network = network.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    elif mode == "inference":
        network = network.to(dtype)  # once, as ours is, and not at each call
    network.train(mode == "training")
    mixed = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)

    def infer() -> None:
        with torch.inference_mode(), mixed:
            network(x)

    def train() -> None:
        with mixed:
            outputs = network(x)
        sum(out.float().mean() for out in outputs.values()).backward()
        network.zero_grad(set_to_none=True)

    return infer if mode == "inference" else train


def parse() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="where to measure (%(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["float32"],
                        help="of inference; training runs under autocast. The growth sweep takes "
                        "the first, whole networks the last")  # fmt: skip
    parser.add_argument("--forms", nargs="*", choices=("direct", "reduced"),
                        default=["direct", "reduced"], help="of the head")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 97, 128],
                        help="edges of the head's input, in positions")  # fmt: skip
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                        help="one size in place of --sizes")  # fmt: skip
    parser.add_argument("--only", nargs="*", help="names of the heads to measure")
    parser.add_argument("--train", action="store_true", help="measure training steps as well")
    parser.add_argument("--largest_training", type=int, default=97,
                        help="largest edge for training")  # fmt: skip
    parser.add_argument("--growth", type=int, nargs="*", default=[32, 64, 96, 128, 192, 256],
                        help="edges of the growth sweep; none: no sweep")  # fmt: skip
    parser.add_argument(
        "--largest_dense", type=int, default=128,
        help="the largest of them for dense attention, which takes 8 EDGE^4 bytes",
    )  # fmt: skip
    parser.add_argument("--networks", action="store_true", help="measure whole networks as well")
    parser.add_argument("--backbones", nargs="*", default=["resnet18", "resnet50", "resnet101"],
                        help="of the networks")  # fmt: skip
    parser.add_argument("--network_sizes", type=int, nargs="*", default=[512, 1024, 769, 769],
                        metavar="H W", help="of the images, in pairs")  # fmt: skip
    parser.add_argument("--network_rounds", type=int, default=3, help="timed calls of each network")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each head")
    parser.add_argument("--warmup", type=int, default=2, help="calls of each head before those")
    parser.add_argument("--output", type=Path, default=Path("runs/efficiency"), help="folder")
    parser.add_argument(
        "--pages", type=Path, nargs="*", default=[],
        help="pages whose blocks of tables are to be written anew; with --sizes and --growth and "
        "nothing behind them, from what was measured before",
    )  # fmt: skip
    return parser.parse_args()


def heap(device: str) -> str:
    """Returns who hands out memory."""
    if device == "cuda":
        return "CUDA"
    return "jemalloc" if "jemalloc" in os.environ.get("LD_PRELOAD", "") else "default"


def main() -> None:
    """Measures, prints and writes."""
    args = parse()
    torch.manual_seed(0)
    sizes = [tuple(args.size)] if args.size else [(edge, edge) for edge in args.sizes]
    cells = [(d, form, size) for d in args.dtype for form in args.forms for size in sizes]
    if args.device == "cuda":
        # fp32 is fp32 in convs and products alike, and convs are those that are fastest.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    measured = bool(cells or args.growth or args.networks)
    if measured:
        measure(args, cells)
    record = json.loads((args.output / "efficiency.json").read_text("utf-8"))
    if not measured:
        write(args.output, record)
    blocks = {"efficiency": short_markdown(record), "efficiency ratios": headline(record)}
    print(blocks["efficiency"])
    for page in args.pages:
        for name, text in blocks.items():
            if has_block(page, name):
                write_block(page, name, text)


def measure(args: argparse.Namespace, cells: Sequence[tuple[str, str, tuple[int, int]]]) -> None:
    """Measures what was asked for; each part is written at once."""
    for cell in track(cells, "heads", transient=True):
        add(args, heads=measure_heads(args, *cell))
    if args.growth:
        add(args, growth=measure_growth(args))
    if args.networks:
        add(args, networks=measure_networks(args))


def add(args: argparse.Namespace, **rows: list[Row]) -> None:
    """Writes new rows to the folder, beside those that it holds."""
    facts = {"machine": machine(args.device), "torch": torch.__version__}
    new = {**facts, **{name: [] for name in KEYS}, **rows}
    write(args.output, keep(args.output / "efficiency.json", new))


if __name__ == "__main__":
    main()
