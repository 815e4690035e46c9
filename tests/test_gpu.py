"""What a GPU computes is what the CPU computes, and what only a GPU can do; skipped without one."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import make_folder
from test_cli import TINY
from test_colours import noise
from test_predictions import write_checkpoint

from isanet_pl.callbacks.averaging import ExponentialAverage
from isanet_pl.cli import main
from isanet_pl.data.colours import Jitter, distort
from isanet_pl.losses import SegmentationLoss
from isanet_pl.metrics import SegmentationMetrics
from isanet_pl.models import ISABlock, ISANet, fuse_for_inference
from isanet_pl.models.context import _enlarge
from isanet_pl.models.isanet import Context, Form
from isanet_pl.models.layers import upsample

DEVICE = "cuda"
ROOT = Path(__file__).parent.parent
SMALL = {"key_channels": 8, "value_channels": 8, "out_channels": 16, "aux_channels": 8}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def exact_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    torch.manual_seed(0)
    convs, products = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = convs.allow_tf32, products.allow_tf32
    convs.allow_tf32 = products.allow_tf32 = False
    yield
    convs.allow_tf32, products.allow_tf32 = kept


def make_network(**arguments):
    small = {"backbone": "resnet18", "last_stage": 2, **SMALL}
    network = ISANet(3, **(small | arguments))
    for parameter in network.parameters():  # residual branches start at zero, and would hide faults
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network.to(memory_format=torch.channels_last)


def gradients(network, loss, image, target):
    network.zero_grad()
    value = loss(network(image), target)
    value.backward()
    found = {name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}
    return value.detach().cpu(), found


# What is computed


@pytest.mark.parametrize("context", get_args(Context))
@pytest.mark.parametrize("form", get_args(Form))
def test_a_step_is_that_of_the_cpu(form, context):
    network = make_network(form=form, context=context, dropout=0.0).double().train()
    image = torch.randn(2, 3, 41, 56, dtype=torch.float64)
    target = torch.randint(0, 3, (2, 41, 56))
    target[:, :5] = 255
    loss = SegmentationLoss(class_weights=[1, 2, 0.5], ohem_threshold=0.5, ohem_min_kept=100)
    value, wanted = gradients(network, loss, image, target)
    other = copy.deepcopy(network).to(DEVICE)
    assert other.training
    found, theirs = gradients(other, loss.to(DEVICE), image.to(DEVICE), target.to(DEVICE))
    # The loss is fp32.
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert wanted.keys() == theirs.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(theirs[name], gradient, rtol=1e-3, atol=1e-4 * largest), name


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("order", ["long_short", "short_long"])
def test_padded_windows_are_those_of_the_cpu(order, mask_padding):
    block = ISABlock(16, 8, 8, 16, (4, 3), order=order, mask_padding=mask_padding).double().eval()
    x = torch.randn(2, 16, 13, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        found = copy.deepcopy(block).to(DEVICE)(x.to(DEVICE)).cpu()
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context", ["isa", "dense", "dense_sdpa", "ppm", "aspp"])
def test_mixed_precision_is_close(context, dtype):
    network = make_network(context=context, dropout=0.0, classify_before_upsampling=True)
    network = network.to(DEVICE).train()
    image = torch.randn(4, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        expected = copy.deepcopy(network)(image)["out"]
        with torch.autocast(DEVICE, dtype):
            found = network(image)["out"]
    assert found.dtype == torch.float32
    assert float((found - expected).abs().mean() / expected.abs().mean()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edge", [1, 2, 3, 6])
def test_pooled_maps_keep_their_gradient_in_mixed_precision(edge, dtype):
    # Thousands of addends of one sign: summed in 16 bits, most would be lost.
    like = torch.empty(1, 8, 64, 128, device=DEVICE)
    weight = 1 + torch.rand(1, 8, 64, 128, device=DEVICE)
    found = []
    for kind in (torch.float32, dtype):
        x = torch.zeros(1, 8, edge, edge, device=DEVICE, dtype=kind, requires_grad=True)
        (_enlarge(x, like) * weight.to(kind)).float().sum().backward()
        found.append(x.grad.float())
    assert torch.allclose(*found, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_enlarged_maps_keep_their_gradient_in_mixed_precision(dtype):
    weight = 1 + torch.rand(1, 8, 64, 128, device=DEVICE)
    found = []
    for kind in (torch.float32, dtype):
        x = torch.zeros(1, 8, 8, 16, device=DEVICE, dtype=kind, requires_grad=True)
        enlarged = upsample(x, (64, 128), align_corners=True)
        assert enlarged.dtype == kind
        (enlarged * weight.to(kind)).float().sum().backward()
        found.append(x.grad.float())
    assert torch.allclose(*found, rtol=0.01)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_folded_network_computes_the_same(dtype):
    network = make_network().to(DEVICE).eval()
    image = torch.randn(1, 3, 65, 90, device=DEVICE)
    with torch.inference_mode():
        expected = network(image)["out"]
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            found = fuse_for_inference(network, dtype)(image)["out"]
    tolerance = 1e-4 if dtype is None else 0.1
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("deterministic", [False, True])
def test_scores_are_those_of_the_cpu(deterministic):
    prediction, target = torch.randint(0, 150, (2, 1, 512, 683))
    target[:, :50] = 255
    scores = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for device in ("cpu", DEVICE):
            metrics = SegmentationMetrics(150).to(device)
            metrics.update(prediction.to(device), target.to(device))
            scores.append({name: float(value) for name, value in metrics.compute().items()})
    finally:
        torch.use_deterministic_algorithms(False)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6, nan_ok=True)


def test_colours_change_as_on_the_cpu():
    image = noise(64, 48)
    jitter = Jitter(brightness=10.0, contrast=1.3, saturation=0.7, hue=0.05)
    difference = distort(image.to(DEVICE), jitter).cpu().int() - distort(image, jitter).int()
    assert int(difference.abs().max()) <= 1


def test_the_average_of_the_weights_is_on_the_gpu(tmp_path):
    cli = fit(tmp_path, "--ema_decay", 0.9, "--trainer.precision", "32-true")
    [average] = [c for c in cli.trainer.callbacks if isinstance(c, ExponentialAverage)]
    assert {p.device.type for p in average._average_model.parameters()} == {DEVICE}


# Whole runs


def fit(tmp_path, *options, command="fit"):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("accelerator: cpu", "accelerator: gpu\n  devices: 1"))
    options = (command, "--config", path, "--runs_dir", tmp_path / "runs", *options)
    return main(list(map(str, options)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_trains_and_is_evaluated_on_a_gpu(precision, tmp_path):
    every_step = ("--progress.every_n_steps", 1, "--trainer.log_every_n_steps", 1)
    fit(tmp_path, "--trainer.precision", precision, *every_step)
    run = tmp_path / "runs" / "tiny" / "version_0"
    result = json.loads((run / "results.json").read_text())
    assert result["step"] == 4
    assert torch.cuda.get_device_name() in result["machine"]
    assert "memory/gpu_peak_gib" in (run / "metrics.csv").read_text()
    checkpoint = run / "checkpoints" / "last.ckpt"
    cli = fit(
        tmp_path, "--trainer.precision", precision, "--ckpt_path", checkpoint, command="validate"
    )
    score = float(cli.trainer.callback_metrics["val/miou"])
    tolerance = 0.01 if precision == "32-true" else 0.03  # folding rounds otherwise
    assert score == pytest.approx(result["scores"]["miou"], abs=tolerance)
    mask = ISANet.from_checkpoint(checkpoint).to(DEVICE).predict(noise(50, 70))
    assert (mask.shape, mask.device.type) == ((50, 70), "cpu")


def test_a_stopped_run_goes_on(tmp_path):
    fit(tmp_path, "--trainer.precision", "16-mixed", "--trainer.max_steps", 2)
    cli = fit(tmp_path, "--trainer.precision", "16-mixed", "--resume", "true")
    assert cli.trainer.global_step == 4
    assert cli.resumed is not None


@pytest.mark.slow
def test_a_process_group_with_synchronised_norms(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("accelerator: cpu", "accelerator: gpu\n  devices: 1"))
    options = ("--trainer.strategy", "ddp", "--trainer.sync_batchnorm", "true")
    command = [sys.executable, "-m", "isanet_pl", "fit", "--config", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GMACs" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_an_error_of_one_process_ends_both(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "a.ckpt")
    photos = make_folder(tmp_path / "data", splits=("val",)) / "val" / "images"
    (tmp_path / "out" / "masks").mkdir(parents=True)  # of nobody knows what: the first refuses it
    (tmp_path / "out" / "masks" / "scene0.png").write_bytes((photos / "scene0.png").read_bytes())
    options = ("--ckpt_path", checkpoint, "--data.predict_dir", photos, "--output", "out")
    command = [sys.executable, "-m", "isanet_pl", "predict", *map(str, options)]
    command += ["--trainer.accelerator", "gpu", "--trainer.devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 2
    assert "choose another --output" in done.stderr


@pytest.mark.slow
def test_a_compiled_network_trains(tmp_path):
    cli = fit(tmp_path, "--model.compile", "true", "--trainer.precision", "bf16-mixed")
    assert cli.trainer.global_step == 4


@pytest.mark.slow
def test_the_benchmark_measures_a_gpu(tmp_path):
    script = ROOT / "scripts" / "benchmark_efficiency.py"
    small = ("--device", DEVICE, "--size", "16", "16", "--train", "--growth", "--rounds", "2")
    only = ("--only", "ISA", "ISA, plain formulation", "--dtype", "bfloat16", "float32")
    command = [sys.executable, str(script), *small, *only, "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "efficiency.json").read_text())["heads"]
    assert {row["heap"] for row in rows} == {"CUDA"}
    # Such small maps do not fill a GPU: a conv3x3 may do more a second than the conv1x1.
    assert all(0 < row["ceiling_share"] < 10 for row in rows)
