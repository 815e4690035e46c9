"""The overlays: each changes what it names and nothing else, and trains."""

import contextlib
import io
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from test_configs import read

from isanet_pl.cli import main
from isanet_pl.models import ISANet

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted((CONFIGS / "ablation").glob("*.yaml"))
# Between them, no overlay is what both have already.
DIRECT = CONFIGS / "quickstart.yaml"
REDUCED = CONFIGS / "isanet_r50-d8_4xb2-80k_cityscapes-512x1024.yaml"
AUTHORS = CONFIGS / "isanet-openseg_r101-d8_4xb2-40k_cityscapes-512x1024.yaml"
SMALL = {
    "--data.batch_size": 2,
    "--data.eval_batch_size": 2,
    "--data.num_eval": 2,
    "--data.num_workers": 0,
    "--trainer.precision": "32-true",
    "--trainer.fast_dev_run": 1,
}


@pytest.fixture(autouse=True)
def no_process_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])


def leaves(node, path=""):
    """Returns the values of a nested config by their dotted names."""
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, sub in node.items() for k, v in leaves(sub, f"{path}.{key}").items()}


@cache
def resolve(*arguments):
    """Returns the options of a command line by their dotted names."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return leaves(yaml.safe_load(printed.getvalue()))


@cache
def small_networks():
    """Returns the arguments of the networks of all configs, each once, with a small backbone."""
    small = {"backbone": "resnet18", "pretrained": False, "weights_path": None}
    found = []
    for path in CONFIGS.glob("*.yaml"):
        network = read(path)["model"]["network"] | small
        if network not in found:
            found.append(network)
    return found


def fit_with(*paths):
    return "fit", *(part for path in paths for part in ("--config", str(path)))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_changes_exactly_the_keys_it_names(overlay):
    named = leaves(yaml.safe_load(overlay.read_text()))
    changed = set()
    for base in (DIRECT, REDUCED, AUTHORS):
        before, after = resolve(*fit_with(base)), resolve(*fit_with(base, overlay))
        assert before.keys() == after.keys()
        changed |= {key for key in before if before[key] != after[key]}
        assert {key: after[key] for key in named} == named
    assert changed == named.keys()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_takes_a_step_over_the_quick_start(overlay):
    arguments = [str(part) for pair in SMALL.items() for part in pair]
    cli = main(["fit", "--config", str(DIRECT), "--config", str(overlay), *arguments])
    assert cli.trainer.global_step == 1
    assert "val/miou" in cli.trainer.callback_metrics


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_builds_a_network_over_every_config(overlay):
    changed = read(overlay).get("model", {}).get("network", {})
    for network in small_networks():
        with torch.device("meta"):
            ISANet(5, **{**network, **changed})


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_is_short_and_says_what_it_is(overlay):
    lines = overlay.read_text().splitlines()
    assert len(lines) <= 8
    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")


def test_the_ablations_of_the_paper_are_there():
    # What is null is back at its default.
    values = [
        [(key, value) for key, value in leaves(read(path)).items() if value is not None]
        for path in OVERLAYS
    ]
    assert all(len(pairs) == 1 for pairs in values)
    found = {}
    for [(key, value)] in values:
        found.setdefault(key.rpartition(".")[2], []).append(value)
    assert set(found["context"]) == {"none", "dense", "ppm", "aspp", "rcca"}
    assert set(found["order"]) == {"long", "short", "short_long"}
    windows = [[[2, 2]], [[4, 4]], [[8, 8]], [[16, 16]], [[8, 8], [4, 4]]]
    assert sorted(found["down_factors"]) == sorted(windows)
    assert set(found["form"]) == {"direct", "reduced"}
    assert set(found["aux_head"]) == {True, False}
    assert found["mask_padding"] == [True]
    assert found["ohem_threshold"] == [0.7]
    assert found["new_layers_lr_factor"] == [10]
