"""The suggested config: its numbers, its text, and that it trains."""

import importlib.util
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_scene
from PIL import Image

from isanet_pl.check.fingerprint import Fingerprint, SplitFingerprint
from isanet_pl.check.suggest import Machine, find_machine, suggest_config
from isanet_pl.check.suggest.config import Choice, render
from isanet_pl.check.suggest.geometry import attention_cost, choose_window, plan_geometry
from isanet_pl.check.suggest.machine import RECIPES
from isanet_pl.check.suggest.schedule import choose_batch, plan_schedule
from isanet_pl.cli import main
from isanet_pl.data import SegmentationFolder
from isanet_pl.errors import InputError
from isanet_pl.losses import SegmentationLoss
from isanet_pl.models import ISANet
from isanet_pl.models.attention import TokenGrid

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_dataset.py"
SPEC = importlib.util.spec_from_file_location("check_dataset", SCRIPT)
check_dataset = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_dataset)

CPU, GPU = Machine("cpu", 16e9), Machine("cuda", 24e9)
UNIFORM = {
    "cityscapes": [(1024, 2048, 2975)],
    "camvid": [(360, 480, 367)],
    "portrait": [(1920, 1080, 900)],
    "tiny": [(64, 48, 40)],
    "aerial": [(4000, 6000, 60)],
}
VARIED = [(57, 91, 20), (300, 200, 100), (280, 420, 100), (500, 700, 50), (2000, 3000, 3)]


def make_split(sizes, shares):
    sizes = tuple(sorted(sizes, key=lambda size: (size[0] * size[1], size[0])))
    return SplitFingerprint(
        num_pairs=sum(images for *_, images in sizes),
        documented=None,
        sizes=sizes,
        mean=(100.0, 100.0, 100.0),
        std=(50.0, 50.0, 50.0),
        brightest=255,
        class_pixels=tuple(round(1e9 * share) for share in shares),
        class_images=(1,) * len(shares),
        ignored_pixels=0,
        outside_pixels=0,
        codes={},
        outside={},
        files={},
        largest=(None,) * len(shares),
        redrawn=(),
        num_masks=9,
    )


def make_fingerprint(sizes, shares=(0.25, 0.25, 0.25, 0.25), val=None):
    names = tuple(f"class{i}" for i in range(len(shares)))
    val = [(h, w, max(1, n // 5)) for h, w, n in sizes] if val is None else val
    splits = {"train": make_split(sizes, shares), "val": make_split(val, shares)}
    return Fingerprint("SegmentationFolder", "my_data", names, splits, {})


def suggest(fingerprint, machine=CPU, **init_args):
    text = suggest_config(fingerprint, machine, "SegmentationFolder", init_args)
    return yaml.safe_load(text), text


# What the network sees


def test_cost_counts_the_pairs_that_attend_to_each_other():
    for height, width, window in itertools.product((9, 16), (13, 40), ((8, 8), (3, 5), (1, 1))):
        grid = TokenGrid(height, width, window)
        tokens = grid.split(torch.zeros(1, 1, height, width))
        places, windows = tokens.shape[2:]
        long_range = places * windows * windows  # each place's group: all windows with each other
        short_range = windows * places * places
        assert attention_cost(height, width, window) == long_range + short_range
    assert attention_cost(10, 12, (1, 1)) == 120 * 120 + 120


@pytest.mark.parametrize(("height", "width"), [(64, 64), (41, 55), (12, 16), (97, 97), (1, 30)])
def test_the_window_is_the_cheapest_of_all_that_are_no_strips(height, width):
    def cost(dh, dw):
        rows, columns = height + -height % dh, width + -width % dw
        tokens = rows * columns
        return tokens * tokens // (dh * dw) + tokens * dh * dw

    sides = itertools.product(range(1, height + 1), range(1, width + 1))
    least = min(cost(dh, dw) for dh, dw in sides if dh <= 2 * dw and dw <= 2 * dh)
    window = choose_window(height, width)
    assert cost(*window) == least == attention_cost(height, width, window)
    assert max(window) <= 2 * min(window)


def test_of_equally_cheap_windows_the_squarest_is_taken():
    assert attention_cost(8, 9, (2, 3)) == attention_cost(8, 9, (4, 3))
    assert choose_window(8, 9) == (4, 3)
    assert choose_window(64, 64) == (8, 8)  # the paper's


def test_mmsegmentations_crop_for_cityscapes_is_found():
    geometry = plan_geometry(make_fingerprint(UNIFORM["cityscapes"]), GPU)
    assert geometry.crop_size == (512, 1024)
    assert geometry.base_size is None
    assert geometry.scale_range == (0.5, 2.0)
    assert not geometry.slide


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", [*UNIFORM, "varied"])
def test_crops_fit_images_memory_and_stride(name, machine):
    fingerprint = make_fingerprint(UNIFORM.get(name, VARIED))
    geometry = plan_geometry(fingerprint, machine)
    crop, image = geometry.crop_size, geometry.image_size
    assert all(edge % 8 == 0 for edge in crop)
    if name != "varied":  # else crops are square
        assert all(c <= i + 8 for c, i in zip(crop, image, strict=True))
        assert crop[1] / crop[0] == pytest.approx(image[1] / image[0], rel=0.08)
    else:
        assert crop[0] == crop[1] <= min(image) + 8
    if math.prod(image) > 1.1 * geometry.crop_pixels and name != "varied":  # not the whole image
        assert geometry.crop_pixels <= machine.recipe.crop_pixels
    low, high = geometry.scale_range
    assert 0.5 <= low <= 0.75
    assert high == 2.0
    assert low**2 * math.prod(image) >= 0.45 * geometry.crop_pixels
    largest = max(h * w for h, w, _ in fingerprint.splits["val"].sizes)
    scale = 1 if geometry.base_size is None else math.prod(image) / largest
    assert geometry.slide == (largest * scale > 4.4 * geometry.crop_pixels)


def test_images_are_scaled_only_where_they_must():
    def base(sizes, machine=GPU):
        return plan_geometry(make_fingerprint(sizes), machine).base_size

    assert base(UNIFORM["camvid"]) is None
    assert base(UNIFORM["portrait"]) is None
    assert base(UNIFORM["tiny"]) == (256, 192)  # four times as large
    assert base([(96, 128, 50)]) == (344, 256)
    long, short = base(VARIED)
    assert (long, short) == (4 * short, 280)
    long, short = base(UNIFORM["aerial"], CPU)
    assert long * short == pytest.approx(4 * RECIPES["cpu"].crop_pixels, rel=0.05)


def test_few_outliers_are_seen_by_windows_and_only_where_they_are_evaluated():
    sizes = UNIFORM["camvid"]
    assert not plan_geometry(make_fingerprint(sizes), CPU).slide
    wide = make_fingerprint(sizes, val=[(360, 480, 50), (360, 4000, 1)])
    assert plan_geometry(wide, CPU).slide


# Memory, batches, length


def measure(K, size):
    """Returns the bytes that the backward pass keeps of the forward pass, for each pixel."""
    arguments = {**RECIPES["cpu"].network, "pretrained": False}
    network = ISANet(K, **arguments).train()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.zeros(1, 3, *size, dtype=torch.uint8)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = SegmentationLoss()(network(network.normalise(image)), image[:, 0])
    assert loss.requires_grad  # else the tensors would be gone
    return sum(kept.values())


def test_the_memory_model_covers_what_a_step_keeps():
    # Differences, so that what does not grow with the crop (weights in bf16) drops out.
    recipe = RECIPES["cpu"]
    for num_classes in (2, 40):
        added = measure(num_classes, (192, 128)) - measure(num_classes, (64, 128))
        measured = added / (128 * 128)
        model = recipe.pixel_bytes + num_classes * recipe.class_bytes
        assert measured < model < 2.5 * measured


def test_less_memory_means_smaller_batches_and_then_smaller_crops():
    fingerprint = make_fingerprint(UNIFORM["cityscapes"])
    batches, crops = [], []
    for gigabytes in (80, 24, 11, 8, 3):
        machine = Machine("cuda", 1e9 * gigabytes)
        geometry = plan_geometry(fingerprint, machine)
        schedule = plan_schedule(fingerprint, machine, geometry)
        assert schedule.step_images == schedule.reference == (8 if gigabytes > 3 else 16)
        assert schedule.batch_size >= 2
        assert schedule.step_bytes < 0.9 * machine.memory
        batches.append(schedule.batch_size)
        crops.append(geometry.crop_pixels)
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > batches[-1]
    assert crops == sorted(crops, reverse=True)
    with pytest.raises(InputError, match=r"1\.0 GB of memory are too little"):
        plan_geometry(fingerprint, Machine("cuda", 1e9))


@pytest.mark.parametrize(
    ("images", "reference", "devices", "most", "expected"),
    [
        (3000, 16, 1, 100, (1, 16, 1)),
        (3000, 16, 1, 5, (1, 4, 4)),
        (3000, 16, 4, 100, (4, 4, 1)),
        (3000, 8, 4, 100, (4, 2, 1)),
        (3000, 8, 8, 100, (4, 2, 1)),  # one image a device is nothing for BatchNorm
        (3000, 16, 3, 100, (2, 8, 1)),
        (20, 16, 1, 100, (1, 4, 1)),
        (3, 8, 1, 100, (1, 2, 1)),
        (1, 8, 1, 100, (1, 1, 1)),
    ],
)
def test_batches_add_up_to_the_step(images, reference, devices, most, expected):
    assert choose_batch(images, reference, devices, most) == expected


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("images", [2, 30, 400, 3000, 100_000])
def test_a_run_has_a_sensible_length(images, machine):
    fingerprint = make_fingerprint([(360, 480, images)])
    geometry = plan_geometry(fingerprint, machine)
    schedule = plan_schedule(fingerprint, machine, geometry)
    low, high = machine.recipe.steps
    assert schedule.num_steps <= high
    assert schedule.num_steps >= low or schedule.epochs > 0.9 * machine.recipe.most_epochs
    assert schedule.epochs <= 1.1 * machine.recipe.most_epochs * max(
        1, 360 * 480 / geometry.crop_pixels
    )
    assert schedule.num_steps % schedule.num_validations == 0
    assert 2 <= schedule.num_validations <= 10


def test_a_large_val_split_is_evaluated_less_often():
    few, many = (
        make_fingerprint([(360, 480, 400)], val=[(360, 480, images)]) for images in (50, 4000)
    )
    counts = []
    for fingerprint in (few, many):
        geometry = plan_geometry(fingerprint, CPU)
        counts.append(plan_schedule(fingerprint, CPU, geometry).num_validations)
    assert counts == [10, 2]


# The text


def test_rare_classes_get_weights():
    config, text = suggest(make_fingerprint(UNIFORM["camvid"], (0.7, 0.296, 0.004)))
    weights = config["model"]["loss"]["class_weights"]
    assert weights == [round(1 / math.log(1.1 + share), 2) for share in (0.7, 0.296, 0.004)]
    assert weights[2] > 4 * weights[0]
    assert "class2, has 0.40% of the" in text
    assert config["data"]["init_args"]["cat_max_ratio"] == 1.0  # nearly every crop has more


def test_rare_ones_among_many_classes_get_ohem():
    shares = (0.403, *[0.01] * 59, 0.007)
    config, _ = suggest(make_fingerprint(UNIFORM["camvid"], shares))
    assert config["model"]["loss"]["ohem_threshold"] == 0.7
    crop = config["data"]["init_args"]["crop_size"]
    batch_pixels = config["data"]["init_args"]["batch_size"] * math.prod(crop)
    assert config["model"]["loss"]["ohem_min_kept"] == batch_pixels // 10
    assert "class_weights" not in config["model"]["loss"]
    assert "cat_max_ratio" not in config["data"]["init_args"]


def test_balanced_classes_get_neither():
    config, _ = suggest(make_fingerprint(UNIFORM["camvid"]))
    assert config["model"]["loss"] == {}


def test_a_class_that_never_occurs_is_not_the_rarest():
    config, text = suggest(make_fingerprint(UNIFORM["camvid"], (0.5, 0.5, 0)))
    assert config["model"]["loss"] == {}
    assert "class2" not in text


def test_small_data_scale_the_learning_rate():
    model = suggest(make_fingerprint([(360, 480, 20)]), GPU)[0]["model"]
    assert (model["reference_batch_size"], model["scale_lr"]) == (16, True)
    assert "scale_lr" not in suggest(make_fingerprint(UNIFORM["camvid"]), GPU)[0]["model"]


def test_several_gpus_share_a_step():
    trainer = suggest(make_fingerprint(UNIFORM["camvid"]), replace(GPU, num_devices=4))[0][
        "trainer"
    ]
    assert (trainer["devices"], trainer["sync_batchnorm"]) == (4, True)


def test_validations_are_counted_in_batches():
    config, _ = suggest(make_fingerprint(UNIFORM["cityscapes"]), Machine("cuda", 8e9))
    trainer = config["trainer"]
    assert trainer["accumulate_grad_batches"] == 4
    batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
    assert batches == 10 * trainer["val_check_interval"]
    assert trainer["check_val_every_n_epoch"] is None


def test_windows_are_written_where_images_are_large():
    config, _ = suggest(make_fingerprint(UNIFORM["aerial"]), GPU)
    inference = config["model"]["inference"]
    assert inference["mode"] == "slide"
    assert inference["crop_size"] == config["data"]["init_args"]["crop_size"]
    assert "stride" not in inference  # the default is two thirds


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_every_choice_has_its_reason(machine):
    _, text = suggest(make_fingerprint(VARIED, (0.9, 0.099, 0.001)), machine)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for key in (
        "form",
        "pretrained",
        "down_factors",
        "class_weights",
        "reference_batch_size",
        "mode",
        "base_size",
        "crop_size",
        "scale_range",
        "cat_max_ratio",
        "batch_size",
        "accumulate_grad_batches",
        "max_steps",
        "val_check_interval",
    ):
        where = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        assert lines[where - 1].strip().startswith("# "), key


def test_any_names_and_values_survive():
    names = ["no", "on", "1", "a: b", "it's", '"x"', "null", "ä ö", "#7", "- x", "[y]", "y", "~"]
    values = {"names": names, "map": {0: 255, 7: 0}, "small": 0.0003, "flag": False, "none": None}
    text = render([Choice(f"a.{name}", value, f"of {name}") for name, value in values.items()])
    assert yaml.safe_load(text) == {"a": values}
    assert "class_path: torch.optim.AdamW" in render([Choice("class_path", "torch.optim.AdamW")])


# With the command line


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    """Scenes of 24x32 pixels without classes.txt, the third class rare."""
    root = tmp_path_factory.mktemp("suggest") / "my_data"
    for offset, (split, count) in enumerate((("train", 12), ("val", 3))):
        for index in range(count):
            image, mask = make_scene(20 * offset + index, (24, 32), [0, 1, 255])
            mask[3, 3:6] = 2
            for kind, pixels in (("images", image), ("masks", mask)):
                path = root / split / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def check(root, path, *options):
    names = ["--data.class_names", "[road, 'a: b', 'no']", "--data.flip", "false"]
    names += ["--data.batch_size", "3"]  # which is for the suggestion to choose
    args = ["--data", "SegmentationFolder", "--data.root", str(root), *names, "--workers", "1"]
    return check_dataset.main([*args, "--suggest-config", str(path), *options])


def test_the_suggested_config_trains_as_it_stands(small_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    path = tmp_path / "configs" / "mine.yaml"
    assert check(small_root, path, "--device", "cpu") == 0
    assert f"isanet-pl fit --config {path}" in capsys.readouterr().out
    config = yaml.safe_load(path.read_text())
    assert config["data"]["init_args"]["root"] == str(small_root)
    assert config["data"]["init_args"]["crop_size"] == [96, 128]
    assert config["data"]["init_args"]["batch_size"] == 2  # a quarter of the images at most
    assert config["model"]["loss"]["class_weights"][2] > 9
    offline = ["--model.network.pretrained", "false", "--data.num_workers", "0"]
    cli = main(["fit", "--config", str(path), *offline, "--trainer.fast_dev_run", "2"])
    assert cli.trainer.global_step == 2
    assert cli.datamodule.class_names == ["road", "a: b", "no"]
    assert cli.datamodule.train_transform.flip is False
    assert cli.config["fit"].data.init_args.base_size == (128, 96)


def test_the_config_for_a_gpu_parses_and_builds(small_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    path = tmp_path / "gpu.yaml"
    assert check(small_root, path, "--device", "cuda", "--memory", "8") == 0
    offline = ["--model.network.pretrained", "false", "--trainer.accelerator", "cpu"]
    cli = main(["--config", str(path), *offline], run=False)
    assert cli.config.model.network.backbone == "resnet50c"
    assert cli.model.reference_batch_size == 16
    assert cli.config.trainer.devices == 1


def test_a_wrong_wish_is_told_before_any_file_is_read(small_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check_dataset, "list_splits", None)  # to call it would raise
    assert check(small_root, tmp_path / "new" / "mine.yaml", "--device", "cuda") == 2
    assert "say how many GB yours has with --memory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert check(small_root, tmp_path / "file" / "mine.yaml") == 2
    assert f"cannot access {tmp_path / 'file'}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]  # no report of nothing


class Mine(SegmentationFolder):
    """A data set of a user's own, whose other options are those of its base."""

    def __init__(self, suffix: str = "", **options):
        super().__init__(**options)


def test_a_class_of_ones_own_keeps_its_options(small_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--data", f"{__name__}.Mine", "--data.root", str(small_root), "--workers", "1"]
    args += ["--data.class_names", "[road, tree, sky]", "--data.suffix", "x"]
    assert check_dataset.main([*args, "--suggest-config", "mine.yaml", "--device", "cpu"]) == 0
    data = yaml.safe_load((tmp_path / "mine.yaml").read_text())["data"]
    assert data["class_path"] == f"{__name__}.Mine"
    assert data["init_args"]["class_names"] == ["road", "tree", "sky"]
    assert data["init_args"]["suffix"] == "x"


def test_nothing_is_overwritten(small_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert check(small_root, path) == 2
    assert "mine.yaml exists" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_no_config_is_written_for_data_that_are_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        image, mask = make_scene(0, (24, 32), [0, 1, 2])
        for kind, pixels in (("images", image), ("masks", mask)):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "data" / split / kind / "0.png")
    assert check(tmp_path / "data", tmp_path / "mine.yaml") == 1
    assert "correct the errors first" in capsys.readouterr().out
    assert not (tmp_path / "mine.yaml").exists()


def test_a_cpu_without_bfloat16_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    machine = find_machine("cpu", 16)
    assert machine == Machine("cpu", 16e9, precision="32-true")
    plain, _ = suggest(make_fingerprint(UNIFORM["camvid"]), CPU)
    single, text = suggest(make_fingerprint(UNIFORM["camvid"]), machine)
    assert plain["trainer"]["precision"] == "bf16-mixed"
    assert single["trainer"]["precision"] == "32-true"
    assert "no instructions for bfloat16" in text
    assert machine.room(11) < CPU.room(11)


def test_machines_are_found_or_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_machine("cuda", 11) == Machine("cuda", 11e9, 1)
    assert find_machine().device == "cpu"
    assert 1e9 < find_machine().memory < 1e14
    assert str(find_machine("cpu", 2)) == "a CPU with 2 GB"
    with pytest.raises(InputError, match="--memory"):
        find_machine("cuda")
