"""Measures training samples per second of one core: resize-then-crop, crop-then-resize, cached.

python scripts/benchmark_data.py --camvid data/camvid --output docs/benchmark_data.json \
    --readme docs/data.md

All variants decode the same files with the same library and end with the same kind of sample: a
uint8 crop at a random scale of 0.5 to 2, mirrored at random, drawn again where one class fills it.
They alternate within one process; colours, which are changed on the device, are left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from benchmarking.measuring import machine
from PIL import Image
from reporting.blocks import write_block
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from isanet_pl.data import CamVid, SegmentationDataModule, SegmentationFolder
from isanet_pl.data.dataset import PairDataset
from isanet_pl.data.transforms import TrainTransform, Window

NUM_CLASSES = 19
Sampler = Callable[[int], Any]


class ResizeThenCrop(TrainTransform):
    """Returns the sample that mmsegmentation's order of work gives: the whole image is resized."""

    def draw(self, mask: Tensor) -> Window:
        """Returns all of the image, scaled."""
        low, high = self.scale_range
        scale = low + (high - low) * float(torch.rand(()))
        h, w = mask.shape
        return Window(0, 0, h, w, max(1, round(h * scale)), max(1, round(w * scale)), False)

    def cut(self, image: Tensor, mask: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Returns a crop of the resized image."""
        size = [window.out_height, window.out_width]
        image = TF.resize(image, size, antialias=False)
        mask = TF.resize(mask[None], size, InterpolationMode.NEAREST_EXACT)[0]
        crop = TrainTransform(
            self.crop_size, (1, 1), cat_max_ratio=self.cat_max_ratio, flip=self.flip
        )
        image, mask = crop(image, mask)
        # It may be a view of the resized image, which a loader must not pass on.
        return image.clone(), mask.clone()


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Returns a picture with soft light, edges and grain, which a PNG packs as it does a street."""
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((4, 60), (16, 30), (64, 15), (256, 6)):
        coarse = rng.normal(0, strength, (cells // 2, cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel])
            pixels[..., channel] += np.asarray(
                layer.resize((width, height), Image.Resampling.BICUBIC)
            )
    grain = rng.normal(0, 1.5, (height, width, 1)).astype(np.float32)
    return Image.fromarray((pixels + grain + 110).clip(0, 255).astype(np.uint8))


def write_photographs(root: Path, count: int, height: int, width: int) -> None:
    """Writes a SegmentationFolder of PNG pairs."""
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in track(range(count), "writing pictures", transient=True):
        photograph(rng, height, width).save(root / "train" / "images" / f"{i}.png")
        classes = rng.integers(0, NUM_CLASSES, (16, 32), dtype=np.uint8)
        mask = Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST)
        mask.save(root / "train" / "masks" / f"{i}.png")


def build(data: SegmentationDataModule) -> PairDataset:
    """Returns the training samples."""
    dataset = data.build_dataset("train")
    assert isinstance(dataset, PairDataset)
    return dataset


def samplers(make: Callable[..., SegmentationDataModule], cache: Path) -> dict[str, Sampler]:
    """Returns a function from an index to a sample for each variant, the cache filled."""
    plain, slow, cached = build(make()), build(make()), build(make(cache=str(cache)))
    ours = plain.transform
    assert ours is not None
    slow.transform = ResizeThenCrop(
        ours.crop_size, ours.scale_range, cat_max_ratio=ours.cat_max_ratio, flip=ours.flip
    )
    for i in track(range(len(cached)), "filling the cache", transient=True):
        for seed in (i, i + 1):  # with the first, the cache is written; with the second, read
            torch.manual_seed(seed)
            expected = plain[i]
            torch.manual_seed(seed)
            sample = cached[i]
            for key in ("image", "mask"):
                if not torch.equal(sample[key], expected[key]):
                    raise SystemExit(f"the cache gives another {key} for {sample['name']}")
    return {
        "decoding alone": lambda i: plain.decode(plain.pairs[i]),
        "resize, then crop": slow.__getitem__,
        "crop, then resize": plain.__getitem__,
        "cached": cached.__getitem__,
    }


def measure(variants: dict[str, Sampler], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Returns milliseconds a sample of each variant: median, least and most of the rounds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in track(range(rounds), "measuring", transient=True):
        for name, sample in variants.items():
            torch.manual_seed(number)
            order = torch.randperm(count).tolist()
            start = time.perf_counter()
            for i in order:
                torch.manual_seed(count * number + i)  # all variants draw the same scale
                sample(i)
            times[name].append(1000 * (time.perf_counter() - start) / count)
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Returns Markdown."""
    lines = [
        "| data | variant | ms a sample (least to most) | samples/s | against resize, then crop |",
        "|---|---|---|---|---|",
    ]
    for data, rows in results.items():
        reference = rows["resize, then crop"]["median"]
        for name, ms in rows.items():
            ratio = "" if name == "decoding alone" else f"{reference / ms['median']:.2f}x"
            lines.append(
                f"| {data} | {name} | {ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f}) "
                f"| {1000 / ms['median']:.0f} | {ratio} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, help="folder of CamVid, measured as well")
    pixels: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("H", "W")}
    parser.add_argument("--size", **pixels, default=(1024, 2048), help="of the PNG pictures")
    parser.add_argument("--crop", **pixels, default=(512, 1024), help="that is taken from them")
    parser.add_argument("--count", type=int, default=24, help="pictures of each kind")
    parser.add_argument("--rounds", type=int, default=9, help="times that all are measured")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--readme", type=Path, help="page whose table is to be replaced")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's process
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "png", args.count, *args.size)
        sources: dict[str, tuple[type[SegmentationDataModule], Path, dict[str, Any]]] = {
            f"PNG {args.size[0]}x{args.size[1]}, crop {args.crop[0]}x{args.crop[1]}": (
                SegmentationFolder,
                folder / "png",
                {"crop_size": args.crop, "class_names": [f"c{i}" for i in range(NUM_CLASSES)]},
            )
        }
        if args.camvid:
            sources["CamVid JPEG 360x480, crop 320x416"] = (
                CamVid,
                args.camvid,
                {"crop_size": (320, 416)},
            )
        for label, (data_class, root, options) in sources.items():

            def make(**more: Any) -> SegmentationDataModule:
                # Colours are left to the device.
                more |= {"num_workers": 0, "photometric": False}
                return data_class(root=str(root), **options, **more)  # noqa: B023

            variants = samplers(make, folder / "cache")
            results[label] = measure(variants, min(args.count, len(build(make()))), args.rounds)
    print(table(results))
    record = {"machine": machine(), "torch": torch.__version__, "ms": results}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    if args.readme:
        write_block(args.readme, "data benchmark", f"{table(results)}\n\nMeasured on {machine()}.")


if __name__ == "__main__":
    main()
