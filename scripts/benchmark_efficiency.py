"""Measures ISA against its plain formulation and against other context modules, in one process.

python scripts/benchmark_efficiency.py --train --networks --output docs/efficiency

For each form of the head, context module and size of its input: parameters, multiply-adds, peak
memory, what training keeps for the backward pass, and the latency of inference and, with --train,
of a training step; then how cost grows with the size of the map and with the window. Writes CSV,
JSON, Markdown and PNG. On a CPU, most of what temporaries cost is the system's handing out of
memory; run it once as it is, and once with jemalloc (README, Runs), which shows the arithmetic.
"""

import argparse
import copy
import csv
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from matplotlib.figure import Figure
from measuring import alternate, conv_ceiling, gmacs, machine, peak_mib, saved_mib, spread
from readme import write_block
from rich.progress import track
from torch import Tensor, nn

from isanet_pl.models import ISAModule, ISANet, fuse_for_inference
from isanet_pl.models.context import (
    AtrousPyramid,
    DenseAttention,
    NoContext,
    PyramidPooling,
    RecurrentCrissCross,
)
from isanet_pl.models.layers import conv_bn_relu
from isanet_pl.models.plain import plain_forward

WIDTHS = (256, 512, 512)  # key, value, output
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


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
        "ISA, plain formulation": Plain(ISAModule(channels, *WIDTHS)),
        "dense attention": DenseAttention(channels, WIDTHS[0], WIDTHS[2]),
        "dense attention, SDPA": DenseAttention(channels, WIDTHS[0], WIDTHS[2], sdpa=True),
        "long range alone": ISAModule(channels, *WIDTHS, order="long"),
        "short range alone": ISAModule(channels, *WIDTHS, order="short"),
        "RCCA": RecurrentCrissCross(channels, 512),
        "PPM": PyramidPooling(channels, 512),
        "ASPP": AtrousPyramid(channels, 512),
        "none": NoContext(channels, 512),
    }
    if form == "reduced":
        reduction = conv_bn_relu(2048, 512, 3)
        modules = {k: nn.Sequential(copy.deepcopy(reduction), m) for k, m in modules.items()}
        modules |= _mmsegmentation()
    return modules


def _mmsegmentation() -> dict[str, nn.Module]:
    """Returns mmsegmentation's head where it is installed (scripts/setup_peer.sh)."""
    if importlib.util.find_spec("mmseg") is None:
        return {}

    class Operators(ModuleType):
        """Stands for mmcv's compiled operators, which ISANet does without but mmseg imports."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules.setdefault("mmcv.ops", Operators("mmcv.ops"))
    from mmseg.models.decode_heads import ISAHead

    class Features(ISAHead):  # type: ignore[misc]
        """Returns the features that its classifier gets."""

        def cls_seg(self, features: Tensor) -> Tensor:
            return features

        def forward(self, x: Tensor) -> Any:
            return super().forward([x])

    head = Features(
        in_channels=2048, channels=512, isa_channels=256, down_factor=(8, 8), num_classes=19,
        in_index=0, norm_cfg={"type": "BN"}, dropout_ratio=0.0,
    )  # fmt: skip
    return {"ISA, mmsegmentation": head}


def is_plain(name: str) -> bool:
    """Returns whether a head is run as others publish it: NCHW, not folded."""
    return name in ("ISA, plain formulation", "ISA, mmsegmentation")


def prepare(name: str, module: nn.Module, x: Tensor, train: bool) -> tuple[nn.Module, Tensor]:
    """Returns a head and its input as they are run."""
    if is_plain(name):
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
    ceiling = conv_ceiling(size, dtype, device)
    for mode in ("inference", "training") if args.train else ("inference",):
        train = mode == "training"
        batch = 2 if train else 1
        if train and size[0] * size[1] > args.largest_training**2:
            continue
        calls: dict[str, Callable[[], object]] = {}
        facts: dict[str, Row] = {}
        for name, module in modules.items():
            x = torch.randn(batch, 2048, *size, device=device)
            ready, x = prepare(name, copy.deepcopy(module).to(device), x, train)
            if not train:
                ready, x = ready.to(dtype), x.to(dtype)
            call = _training_step(ready, x, dtype) if train else _inference(ready, x)
            facts[name] = {
                "parameters": sum(p.numel() for p in module.parameters()),
                "gmacs": gmacs(_inference(copy.deepcopy(ready).eval(), x)) / batch,
                "peak_mib": peak_mib(call),
                "saved_mib": _saved(ready, x, dtype) if train else None,
            }
            calls[name] = call
        for name, times in alternate(calls, args.rounds).items():
            work = facts[name]["gmacs"] * batch * (3 if train else 1)
            share = work / (spread(times)["min"] / 1000) / ceiling
            rows.append(
                {"form": form, "size": f"{size[0]}x{size[1]}", "mode": mode, "batch": batch,
                 "dtype": dtype_name, "head": name, **facts[name], **spread(times),
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
    """Returns cost of the attention alone by size of the map, and by window at 128x128."""
    rows = []
    kinds = {"ISA": {}, "dense attention": {"down_factors": ((1, 1),), "order": "long"}}
    cells = [(name, kind, size, 8) for name, kind in kinds.items() for size in args.growth]
    cells += [("window", {}, args.growth[-2], window) for window in (1, 2, 4, 8, 16, 32)]
    for name, options, size, window in track(cells, "growth", transient=True):
        factors = options.get("down_factors", ((window, window),))
        module = ISAModule(512, *WIDTHS, factors, order=options.get("order", "long_short"))
        ready, x = prepare(name, module, torch.randn(1, 512, size, size, device=args.device), False)
        dtype = DTYPES[args.dtype[0]]
        ready, x = ready.to(args.device, dtype), x.to(dtype)
        call = _inference(ready, x)
        positions = size * size
        pairs = positions**2 if name == "dense attention" else (
            positions**2 // window**2 + positions * window**2
        )  # fmt: skip
        times = alternate({"call": call}, max(3, args.rounds // 2), warmup=1)["call"]
        rows.append(
            {"kind": name, "size": size, "window": window, "pairs": pairs,
             "gmacs": gmacs(call), "peak_mib": peak_mib(call), **spread(times)}
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
    if _mmsegmentation():
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
        for name, times in alternate(calls, args.network_rounds, warmup=1).items():
            rows.append(
                {"network": name, "size": f"{size[0]}x{size[1]}", "mode": mode, "batch": batch,
                 "dtype": args.dtype[-1], "images_per_s": 1000 * batch / spread(times)["median"],
                 "peak_mib": peak_mib(calls[name]), **spread(times)}
            )  # fmt: skip
    return rows


def _network_call(
    network: nn.Module, x: Tensor, mode: str, args: argparse.Namespace
) -> Callable[[], object]:
    """Returns a training step or an inference of a network, ours as it is deployed."""
    network, x = copy.deepcopy(network).to(args.device), x.to(args.device)
    if isinstance(network, ISANet):
        network = fuse_for_inference(network) if mode == "inference" else network
        network = network.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    network.train(mode == "training")
    dtype = DTYPES[args.dtype[-1]]
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


def head_table(rows: Sequence[Row]) -> str:
    """Returns Markdown, one table for each form, size and mode."""
    lines: list[str] = []
    for key, group in _grouped(rows, ("form", "size", "mode", "dtype", "batch")):
        form, size, mode, dtype, batch = key
        reference = {row["head"]: row["median"] for row in group}.get("ISA, plain formulation")
        lines += [
            "",
            f"{form} form, {mode}, [{batch}, 2048, {size.replace('x', ', ')}], {dtype}:",
            "",
            "| head | M parameters | GMACs | peak MiB | kept MiB | ms (least to most) "
            "| against plain ISA | of the conv ceiling |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in group:
            kept = "" if row["saved_mib"] is None else f"{row['saved_mib']:.0f}"
            ratio = "" if reference is None else f"{reference / row['median']:.2f}x"
            lines.append(
                f"| {row['head']} | {row['parameters'] / 1e6:.2f} | {row['gmacs']:.1f} "
                f"| {row['peak_mib']:.0f} | {kept} "
                f"| {row['median']:.0f} ({row['min']:.0f} to {row['max']:.0f}) | {ratio} "
                f"| {100 * row['ceiling_share']:.0f} % |"
            )
    return "\n".join(lines[1:])


def network_table(rows: Sequence[Row]) -> str:
    """Returns Markdown of the whole networks."""
    head = "| network (reduced form) | size | mode | dtype | images/s | peak MiB |"
    lines = [head, "|" + "---|" * 6]
    lines += [
        f"| {row['network']} | {row['size']} | {row['mode']}, batch {row['batch']} "
        f"| {row['dtype']} | {row['images_per_s']:.2f} | {row['peak_mib']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _grouped(
    rows: Sequence[Row], keys: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.items()


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Draws how time and memory grow with the map, and which window is the cheapest."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    time_axis, memory_axis, window_axis = figure.subplots(1, 3)
    for name in ("ISA", "dense attention"):
        kind = [row for row in rows if row["kind"] == name]
        edges = [row["size"] for row in kind]
        time_axis.plot(edges, [row["median"] for row in kind], "o-", label=name)
        memory_axis.plot(edges, [row["peak_mib"] for row in kind], "o-", label=name)
    for axis, label in ((time_axis, "ms"), (memory_axis, "peak MiB")):
        axis.set(xscale="log", yscale="log", xlabel="edge of the map, positions", ylabel=label)
        axis.set_xticks(edges, [str(edge) for edge in edges])
        axis.minorticks_off()
        axis.legend()
    windows = [row for row in rows if row["kind"] == "window"]
    edges = [row["window"] for row in windows]
    window_axis.plot(edges, [row["median"] for row in windows], "o-", color="C2")
    window_axis.set(
        xscale="log", xlabel=f"window at {windows[0]['size']}x{windows[0]['size']}", ylabel="ms"
    )
    window_axis.set_xticks(edges, [str(edge) for edge in edges])
    window_axis.minorticks_off()
    figure.suptitle("Inference of the attention on 512 channels")
    figure.savefig(path, dpi=110)


def write(output: Path, record: dict[str, Any]) -> str:
    """Writes all files; returns the Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    parts = [f"Measured on {record['machine']}, torch {record['torch']}, {record['heap']}."]
    for name in ("heads", "growth", "networks"):
        rows = record[name]
        if not rows:
            continue
        with (output / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    if record["heads"]:
        parts.append(head_table(record["heads"]))
    if record["growth"]:
        draw_growth(record["growth"], output / "growth.png")
    if record["networks"]:
        parts.append(network_table(record["networks"]))
    text = "\n\n".join(parts)
    (output / "efficiency.md").write_text(text + "\n", "utf-8")
    (output / "efficiency.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return text


def parse() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["float32"],
                        help="of inference; training runs under autocast")  # fmt: skip
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
    parser.add_argument("--growth", type=int, nargs="*", default=[32, 64, 96, 128, 192],
                        help="edges of the growth sweep; none: no sweep")  # fmt: skip
    parser.add_argument("--networks", action="store_true", help="measure whole networks as well")
    parser.add_argument("--backbones", nargs="*", default=["resnet18", "resnet50", "resnet101"])
    parser.add_argument("--network_sizes", type=int, nargs="*", default=[512, 1024, 769, 769],
                        metavar="H W", help="of the images, in pairs")  # fmt: skip
    parser.add_argument("--network_rounds", type=int, default=3, help="timed calls of each network")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each head")
    parser.add_argument("--output", type=Path, default=Path("runs/efficiency"), help="folder")
    parser.add_argument("--readme", type=Path, help="README whose section is to be replaced")
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    args = parse()
    torch.manual_seed(0)
    sizes = [tuple(args.size)] if args.size else [(edge, edge) for edge in args.sizes]
    cells = [(d, form, size) for d in args.dtype for form in args.forms for size in sizes]
    rows: list[Row] = []
    for cell in track(cells, "heads", transient=True):
        rows += measure_heads(args, *cell)
    heap = "jemalloc" if "jemalloc" in os.environ.get("LD_PRELOAD", "") else "the system's malloc"
    record = {
        "machine": machine(), "torch": torch.__version__, "heap": heap, "heads": rows,
        "growth": measure_growth(args) if args.growth else [],
        "networks": measure_networks(args) if args.networks else [],
    }  # fmt: skip
    text = write(args.output, record)
    print(text)
    if args.readme:
        write_block(args.readme, "efficiency", text)


if __name__ == "__main__":
    main()
