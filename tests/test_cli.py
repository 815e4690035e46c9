"""The command line, in this process: what runs leave behind, and how bad input is refused."""

import csv
import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from rich.console import Console

from isanet_pl import __version__
from isanet_pl.callbacks import results
from isanet_pl.callbacks.results import ResultTable, _table
from isanet_pl.cli import main
from isanet_pl.errors import InputError
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet
from isanet_pl.run_folder import new_run_folder

TINY = """
model:
  network:
    backbone: resnet18
    last_stage: 1
    key_channels: 8
    value_channels: 8
    out_channels: 8
    down_factors: [[4, 4]]
    classify_before_upsampling: true
  loss: {}
data:
  class_path: Synthetic
  init_args:
    {cells: 2, num_train: 8, num_eval: 4, batch_size: 2, eval_batch_size: 2, num_workers: 0}
trainer:
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  accelerator: cpu
  enable_progress_bar: false
"""


@pytest.fixture(autouse=True)
def no_process_arguments(monkeypatch):
    # LightningCLI warns when a process has arguments of its own besides the given ones.
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run(command, config, tmp_path, *args):
    runs = ["--runs_dir", str(tmp_path / "runs")]
    return main([command, "--config", str(config), *runs, *map(str, args)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the run folder of a finished fit."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    main(["fit", "--config", str(config), "--runs_dir", str(folder / "runs")])
    return folder / "runs" / "tiny" / "version_0"


def test_fit_leaves_everything_in_its_run_folder(trained):
    assert (trained / "checkpoints" / "best.ckpt").is_file()
    assert (trained / "checkpoints" / "last.ckpt").is_file()
    assert sorted(p.name for p in (trained / "panels").iterdir()) == [
        "val_step=000002.png",
        "val_step=000004.png",
    ]
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert any(row["val/miou"] for row in rows)
    results = json.loads((trained / "results.json").read_text())
    assert results["step"] == 4
    assert 0 < results["context_gmacs"] < results["gmacs"] < 1
    assert results["image_size"] == [160, 160]
    assert set(results["scores"]) >= {"miou", "macc", "aacc", "iou/background", "iou/red"}


def test_help_says_what_each_command_does_and_the_version_is_told(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "fit Trains a network, and validates it now and then.",
        "validate Scores a trained network on the validation images.",
        "test Scores a trained network on the test images.",
        "predict Segments a folder of images with a trained network.",
        "export Writes a network, without its auxiliary head, into a file and checks the file.",
    ):
        assert sentence in text
    assert text.endswith(__version__)


def test_a_data_set_that_is_not_named_is_asked_for(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    for arguments in (["fit", "--trainer.max_steps", "1"], ["validate", "--ckpt_path", checkpoint]):
        with pytest.raises(InputError, match="no data set is named: --data NAME"):
            main([*map(str, arguments), "--data.root", str(tmp_path)])


def test_a_file_of_something_else_is_no_checkpoint(tiny, tmp_path):
    path = tmp_path / "list.ckpt"
    torch.save([1, 2], path)
    for command, *more in (["fit", "--wandb", "offline"], ["export"], ["validate"]):
        with pytest.raises(InputError, match="no checkpoint of isanet-pl"):
            run(command, tiny, tmp_path, "--ckpt_path", path, *more)


def test_a_precision_that_the_processor_emulates_is_named(tiny, tmp_path, caplog, monkeypatch):
    found = {"avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    precision = ["--trainer.precision", "bf16-mixed", "--trainer.accelerator", "cpu"]
    run("fit", tiny, tmp_path, *precision, "--trainer.fast_dev_run", 1)
    assert "--trainer.precision 32-true is several times as fast as bf16-mixed" in caplog.text
    caplog.clear()
    found["avx512_bf16"] = True
    run("fit", tiny, tmp_path, *precision, "--trainer.fast_dev_run", 1)
    assert "several times" not in caplog.text


def test_saved_config_is_complete_and_runs_again_in_a_new_folder(trained, tmp_path):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["model"]["network"]["mean"] == [123.675, 116.28, 103.53]
    assert saved["model"]["optimizer"]["init_args"]["momentum"] == 0.9
    first = run("fit", trained / "config.yaml", tmp_path, "--trainer.max_steps", 2)
    second = run("fit", trained / "config.yaml", tmp_path, "--trainer.max_steps", 2)
    assert Path(first.trainer.log_dir) == tmp_path / "runs" / "tiny" / "version_0"
    assert Path(second.trainer.log_dir) == tmp_path / "runs" / "tiny" / "version_1"


def test_what_a_checkpoint_alone_says_is_written_beside_its_run(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    nested = tmp_path / "runs" / "grid" / "base" / "seed0" / "version_0" / "checkpoints"
    nested.mkdir(parents=True)
    elsewhere = tmp_path / "downloaded.ckpt"
    for copy in (nested / "best.ckpt", elsewhere):
        shutil.copy(checkpoint, copy)
    for file, name, version in (
        (checkpoint, "tiny", 0),  # of another runs_dir
        (nested / "best.ckpt", "grid/base/seed0", 1),
        (elsewhere, "downloaded", 0),
    ):
        data = ["--data", "Synthetic", "--data.cells", "2", "--data.num_eval", "2"]
        runs = ["--runs_dir", str(tmp_path / "runs")]
        cli = main(["validate", "--ckpt_path", str(file), *data, *runs])
        assert Path(cli.trainer.log_dir) == tmp_path / "runs" / name / f"version_{version}"


def test_fit_ends_with_the_table(tiny, tmp_path, capsys):
    run("fit", tiny, tmp_path)
    out = capsys.readouterr().out
    for row in ("mIoU", "mAcc", "aAcc", "background", "red", "yellow"):
        assert re.search(rf"│ {row} +│ +(\d+\.\d\d|absent) │", out)


def test_brackets_in_class_names_are_no_markup(capsys):
    names = ("[red] ball [/b]", "car [parked]")
    scores = dict.fromkeys(("miou", "macc", "aacc", *(f"iou/{name}" for name in names)), 0.5)
    Console(width=80).print(_table("val", scores))
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_a_fit_that_ends_before_its_first_validation_says_so(tiny, tmp_path, caplog):
    run("fit", tiny, tmp_path, "--trainer.max_steps", 1)
    assert "ended before its first validation (--trainer.val_check_interval 2)" in caplog.text
    assert not (tmp_path / "runs" / "tiny" / "version_0" / "results.json").exists()
    caplog.clear()
    run("fit", tiny, tmp_path, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    assert "first validation" not in caplog.text  # as asked for


def test_the_bar_counts_epochs_of_steps_and_shows_no_version(tiny, tmp_path, capsys):
    run("fit", tiny, tmp_path, "--trainer.enable_progress_bar", "true", "--trainer.max_steps", 6)
    text = capsys.readouterr().out
    assert "Epoch 1/1 " in text  # 8 images, two a step
    assert "Epoch 0/-2" not in text
    assert "v_num" not in text


def test_a_bar_of_ones_own_takes_the_place_of_ours(tiny, tmp_path):
    bar = ("--trainer.callbacks", "TQDMProgressBar", "--trainer.enable_progress_bar", "true")
    trainer = run("fit", tiny, tmp_path, "--trainer.max_steps", 1, *bar).trainer
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
    assert [type(callback).__name__ for callback in bars] == ["TQDMProgressBar"]


def test_a_training_says_what_its_network_costs(tiny, tmp_path, capsys, caplog):
    cli = run("fit", tiny, tmp_path, "--trainer.max_steps", 1)
    text = capsys.readouterr().out
    parameters, gmacs = re.search(r"│ all +│ +([\d.]+) │ +([\d.]+) │", text).groups()
    network = cli.model.network
    assert float(parameters) == round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
    side = cli.datamodule.cells * 80  # no crop of the default size: see `Synthetic`
    assert f"ISANet, images of {side}x{side}" in text
    assert float(gmacs) == round(Inference().count_gmacs(network, side, side), 2)
    assert "FLOPs" not in text  # Lightning's summary, which has none
    assert "summary" not in caplog.text


def test_the_costs_of_the_network_are_left_out_on_demand(tiny, tmp_path, capsys):
    options = ("--trainer.max_steps", 1, "--trainer.enable_model_summary")
    run("fit", tiny, tmp_path, *options, "false")
    assert "GMACs" not in capsys.readouterr().out


def test_an_evaluation_tells_the_cost_of_its_own_images(trained, tmp_path):
    for command in ("validate", "test"):
        options = ("--ckpt_path", trained / "checkpoints" / "last.ckpt", "--data.cells", 3)
        cli = run(command, trained / "config.yaml", tmp_path, *options)
        found = json.loads((Path(cli.trainer.log_dir) / "results.json").read_text())
        assert found["image_size"] == [240, 240]  # 160x160 in the training
        whole = Inference().count_gmacs(cli.model.network, 240, 240)
        assert found["gmacs"] == pytest.approx(whole, abs=1e-3)


def test_validate_gives_the_score_of_the_fit(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    cli = run("validate", trained / "config.yaml", tmp_path, "--ckpt_path", checkpoint)
    fitted = json.loads((trained / "results.json").read_text())["scores"]["miou"]
    assert float(cli.trainer.callback_metrics["val/miou"]) == pytest.approx(fitted, abs=1e-5)


def test_test_reports_under_its_own_name(trained, tmp_path, capsys):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    cli = run("test", trained / "config.yaml", tmp_path, "--ckpt_path", checkpoint)
    assert "test/miou" in cli.trainer.callback_metrics
    assert "val/miou" not in cli.trainer.callback_metrics
    out = capsys.readouterr().out
    assert out.count("┏") == 1  # one table
    # The best checkpoint is of either validation, and the result says of which.
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    results = json.loads((Path(cli.trainer.log_dir) / "results.json").read_text())
    assert results["step"] == step
    assert "test:" in out


def test_predict_writes_masks_and_overlays_at_the_images_own_size(trained, tmp_path):
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"a.jpg": (50, 31), "more/b.png": (64, 64)}
    for name, (width, height) in sizes.items():
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    out = tmp_path / "out"
    checkpoint = trained / "checkpoints" / "best.ckpt"
    arguments = ("--ckpt_path", checkpoint, "--data.predict_dir", images, "--output", out)
    run("predict", trained / "config.yaml", tmp_path, *arguments)
    network = ISANet.from_checkpoint(checkpoint)
    for name, size in sizes.items():
        with Image.open((out / "masks" / name).with_suffix(".png")) as mask:
            assert mask.mode == "P"
            assert mask.size == size
            assert mask.getpalette()[3:6] == [230, 60, 50]  # red
            written = np.array(mask)
        with Image.open(images / name) as image:
            expected = network.predict(image).numpy()
        assert (written == expected).all()
        with Image.open((out / "overlays" / name).with_suffix(".png")) as picture:
            assert picture.mode == "RGB"
            assert picture.size == size


def test_last_checkpoint_is_the_last_step_and_not_the_last_best(trained):
    last = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_several_best_checkpoints_have_a_name_each(tiny, tmp_path):
    kept = ("--checkpoint.save_top_k", -1, "--checkpoint.filename", "best-{step}")
    folder = Path(run("fit", tiny, tmp_path, *kept).trainer.log_dir) / "checkpoints"
    names = {file.name for file in folder.iterdir()}
    assert names == {"best-2.ckpt", "best-4.ckpt", "last.ckpt"}


def test_resume_continues_where_the_run_stopped(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    arguments = ("--ckpt_path", checkpoint, "--trainer.max_steps", 6)
    log_all = ("--trainer.log_every_n_steps", 1)
    cli = run("fit", trained / "config.yaml", tmp_path, *arguments, *log_all)
    assert cli.trainer.global_step == 6
    rows = csv.DictReader((Path(cli.trainer.log_dir) / "metrics.csv").open())
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [4, 5]


def test_checkpoint_alone_rebuilds_the_network(trained):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    network = ISANet.from_checkpoint(trained / "checkpoints" / "best.ckpt")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"network.{name}"])
    assert checkpoint["hyper_parameters"]["class_names"][0] == "background"
    assert len(checkpoint["hyper_parameters"]["palette"]) == 5


def test_config_wins_over_the_checkpoint_and_a_difference_is_refused(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    arguments = ("--ckpt_path", checkpoint, "--model.network.down_factors", "[[8, 8]]")
    with pytest.raises(InputError, match=r"model\.network\.down_factors: checkpoint .*4, 4.*8, 8"):
        run("validate", trained / "config.yaml", tmp_path, *arguments)


def test_checkpoint_of_other_classes_is_refused(trained, tmp_path, folder):
    arguments = ("--data", "SegmentationFolder", "--data.root", folder)
    arguments += ("--data.class_names", "[sky, road, car]")
    checkpoint = ("--ckpt_path", trained / "checkpoints" / "best.ckpt")
    with pytest.raises(InputError, match="trained for 5 classes"):
        run("validate", trained / "config.yaml", tmp_path, *checkpoint, *arguments)


def test_a_trained_network_is_trained_further_on_other_classes(trained, tmp_path, folder):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    arguments = ("--data", "SegmentationFolder", "--data.root", folder, "--data.batch_size", 1)
    arguments += ("--data.class_names", "[sky, road, car]", "--trainer.max_steps", 1)
    weights = ("--model.network.weights_path", checkpoint)
    cli = run("fit", trained / "config.yaml", tmp_path, *weights, *arguments)
    assert cli.model.network.state_dict().keys() - cli.model.network.loaded == {
        "classifier.weight",
        "classifier.bias",
    }
    # What it starts from is no part of what it has become.
    last = Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt"
    assert ISANet.from_checkpoint(last).arguments["weights_path"] is None


def test_weights_alone_are_no_run_to_go_on_with(trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    # As Lightning's `save_weights_only` leaves it, and scripts/convert_checkpoint.py.
    del content["optimizer_states"], content["callbacks"], content["lr_schedulers"]
    torch.save(content, tmp_path / "weights.ckpt")
    with pytest.raises(InputError, match=r"weights alone.*--model\.network\.weights_path"):
        run("fit", trained / "config.yaml", tmp_path, "--ckpt_path", tmp_path / "weights.ckpt")
    assert not (tmp_path / "runs" / "tiny" / "version_0").exists()


def test_processes_of_a_launcher_that_are_not_asked_for_are_refused(
    trained, tiny, tmp_path, monkeypatch
):
    shutil.copytree(trained.parent, tmp_path / "runs" / "tiny")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as by torchrun --nproc_per_node 2
    with pytest.raises(InputError, match=r"number 1 of several, but --trainer\.devices 1"):
        run("fit", tiny, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}


def test_one_device_is_taken_where_nothing_else_is_said(trained):
    assert yaml.safe_load((trained / "config.yaml").read_text())["trainer"]["devices"] == 1


def test_the_machine_of_a_fit_is_what_it_ran_on(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "describe_machine", lambda device, count: f"{count}x {device}")
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device="cuda:1"), world_size=2, global_step=4,
        loggers=[CSVLogger(tmp_path, "run", "version_0")], fast_dev_run=False,
    )  # fmt: skip
    module = torch.nn.Linear(1, 1)
    module.device = "cpu"  # where Lightning brings a module back to before a fit's end
    module.network = None
    table = ResultTable()
    table.scores = {"miou": 0.5, "macc": 0.5, "aacc": 0.5}
    table.on_fit_end(trainer, module)
    record = json.loads((tmp_path / "run" / "version_0" / "results.json").read_text())
    assert record["machine"] == "2x cuda:1"


def test_pretrained_weights_are_not_needed_once_there_is_a_checkpoint(trained, tmp_path):
    arguments = ("--model.network.weights_path", tmp_path / "gone.pth")
    checkpoint = ("--ckpt_path", trained / "checkpoints" / "best.ckpt")
    run("validate", trained / "config.yaml", tmp_path, *checkpoint, *arguments)
    with pytest.raises(InputError, match=r"weights not found: .*gone\.pth"):
        run("fit", trained / "config.yaml", tmp_path, *arguments)


def test_nan_loss_stops_at_its_step_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    # The learning rate warms up from zero to infinity-like: the first validation is still sane.
    arguments = ("--model.optimizer.lr", "1e30", "--model.warmup_fraction", 0.5)
    validate_early = ("--trainer.val_check_interval", 1)
    with pytest.raises(InputError, match=r"training stopped at step \d+: .*(loss|gradient)"):
        run("fit", tiny, tmp_path, *arguments, *validate_early)
    checkpoints = list((tmp_path / "runs").rglob("*.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "CamVid"), "CamVid needs its folder: --data.root DIR"),
        (("--data", "CamVid", "--data.root", "nowhere"), "no such folder: --data.root nowhere"),
        (("--data.batch_size", 0), "batch sizes must be at least 1"),
        (("--data.batch_size", 9), "8 images, fewer than one batch of 9"),
        (("--model.network.down_factors", "[[0, 8]]"), "two integers >= 1"),
        (("--model.network.backbone", "vgg"), "no model named 'vgg'"),
        (("--model.network.weights_path", "no.pth"), "weights not found: no.pth"),
        (("--model.loss.class_weights", "[1, 2]"), "2 entries for 5 classes"),
        (("--ckpt_path", "no.ckpt"), "checkpoint not found: --ckpt_path no.ckpt"),
        (("--runs_dir", "/dev/null/runs"), "cannot write the run folder"),
        (("--trainer.max_steps", -1), "set trainer.max_steps or max_epochs"),
        (("--checkpoint.save_top_k", 3), r"add --checkpoint\.filename 'best-\{step\}'"),
        (("--checkpoint.save_top_k", -1), "needs a name for each checkpoint, not best for all"),
        (("--checkpoint.save_on_exception", "true"), r"would write over best\.ckpt"),
        (("--checkpoint.save_last", "true"), r"a second last\.ckpt over the one"),
        (("--checkpoint.monitor", "val/loss"), "highest loss: add --checkpoint.mode min"),
        (("--checkpoint.save_weights_only", "true", "--ema_decay", 0.9), "leaves out the average"),
        (("--trainer.enable_checkpointing", "false"), "--checkpoint.save_top_k 0"),
        (("--trainer.check_val_every_n_epoch", 0), "limit_val_batches 0"),
        (("--model.loss.ignore_index", 0), "ignore_index is 0"),
        (("--ema_decay", 2), "ema_decay"),
        (("--trainer.limit_train_batches", -1), "limit_train_batches"),
        (("--trainer.logger", "false", "--resume", "true"), "--resume needs the run folder"),
    ],
)
def test_bad_values_are_refused_with_the_fix(tiny, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run("fit", tiny, tmp_path, *arguments)
    # No empty folder is left behind either.
    assert not any(p.is_dir() and not any(p.iterdir()) for p in (tmp_path / "runs").rglob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.network.bacbone", "resnet18"), "bacbone"),
        (("--model.network.form", "wide"), "form"),
        (("--data", "Camvid"), "Camvid"),
        (("--data.rooot", "x"), "rooot"),
    ],
)
def test_unknown_keys_and_values_are_refused_by_the_parser(
    tiny, tmp_path, capsys, arguments, message
):
    with pytest.raises(SystemExit) as stop:
        run("fit", tiny, tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_key_in_a_config_file_is_refused(tiny, tmp_path, capsys):
    tiny.write_text(TINY.replace("backbone:", "bacbone:"))
    with pytest.raises(SystemExit):
        run("fit", tiny, tmp_path)
    assert "bacbone" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_commands_that_need_weights_say_so(tiny, tmp_path, command):
    with pytest.raises(InputError, match=f"{command} needs trained weights: --ckpt_path"):
        run(command, tiny, tmp_path)


def test_truncated_checkpoint_is_refused(trained, tmp_path):
    path = tmp_path / "cut.ckpt"
    path.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut\.ckpt is not a checkpoint"):
        run("validate", trained / "config.yaml", tmp_path, "--ckpt_path", path)


def test_fast_dev_run_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("fit", tiny, tmp_path, "--trainer.fast_dev_run", 1)
    assert [path.name for path in tmp_path.iterdir()] == [tiny.name]


def test_two_runs_never_share_a_folder(tmp_path):
    folders = [new_run_folder(str(tmp_path), "x") for _ in range(3)]
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]


def test_runs_that_start_at_once_never_share_a_folder(tmp_path):
    barrier = threading.Barrier(8)

    def claim(_):
        barrier.wait()
        return [new_run_folder(str(tmp_path), "x") for _ in range(25)]

    with ThreadPoolExecutor(8) as pool:
        folders = [folder for claimed in pool.map(claim, range(8)) for folder in claimed]
    assert len(set(folders)) == 200


def test_wandb_is_not_imported_unless_asked_for(tiny, tmp_path):
    code = (
        "import sys; from isanet_pl.cli import main; "
        f"main(['fit', '--config', {str(tiny)!r}, '--runs_dir', {str(tmp_path)!r}, "
        "'--trainer.max_steps', '1', '--trainer.val_check_interval', '1']); "
        "assert 'wandb' not in sys.modules, 'wandb was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wandb_offline_needs_no_account(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("fit", tiny, tmp_path, "--wandb", "offline", "--trainer.max_steps", 2)
    import wandb

    wandb.teardown()  # or other processes would look for its service
    assert list((tmp_path / "runs" / "tiny" / "version_0" / "wandb").glob("offline-run-*"))


def test_printed_config_round_trips(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("fit", tiny, tmp_path, "--print_config")
    printed = capsys.readouterr().out
    tiny.write_text(printed)
    with pytest.raises(SystemExit):
        run("fit", tiny, tmp_path, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)


def test_a_logger_of_ones_own_comes_after_that_of_the_run_folder(tiny, tmp_path):
    own = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "own")
    for steps, resume in ((2, "false"), (3, "true")):
        more = ("--trainer.max_steps", steps, "--trainer.log_every_n_steps", 1, "--resume", resume)
        cli = run("fit", tiny, tmp_path, *own, *more)
        assert Path(cli.trainer.log_dir) == tmp_path / "runs" / "tiny" / "version_0"
        assert cli.trainer.global_step == steps
    metrics = [tmp_path / "runs" / "tiny" / "version_0" / "metrics.csv"]
    metrics += sorted((tmp_path / "own").rglob("metrics.csv"))
    steps = [
        [int(row["step"]) for row in csv.DictReader(path.open()) if row["train/loss"]]
        for path in metrics
    ]
    assert steps == [[0, 1, 2], [0, 1], [2]]


def test_several_loggers_of_ones_own(tiny, tmp_path):
    folders = [str(tmp_path / name) for name in ("a", "b")]
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": path}} for path in folders]
    cli = run(
        "fit", tiny, tmp_path, "--trainer.logger", json.dumps(loggers), "--trainer.max_steps", 1
    )
    saved = [logger.save_dir for logger in cli.trainer.loggers]
    assert saved == [str(tmp_path / "runs"), *folders]


def test_the_config_of_a_resumed_run_is_of_use_to_every_command(tiny, tmp_path):
    for steps in (2, 4):
        run("fit", tiny, tmp_path, "--resume", "true", "--trainer.max_steps", steps)
    folder = tmp_path / "runs" / "tiny" / "version_0"
    config = folder / "config.yaml"
    assert yaml.safe_load(config.read_text())["resume"] is False
    best = ("--ckpt_path", folder / "checkpoints" / "best.ckpt")
    cli = run("test", config, tmp_path, *best, "--name", "again")
    assert cli.trainer.state.finished
    file = tmp_path / "net.pt2"
    main(["export", *map(str, ("--config", config, *best, "--path", file, "--size", "[32, 32]"))])
    assert file.is_file()
    run("fit", config, tmp_path)  # once more, from the start
    assert (folder.parent / "version_1" / "results.json").is_file()


def test_no_logger_if_none_is_wanted(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(TINY)
    no_logger = ("--trainer.logger", "false", "--trainer.max_steps", 1)
    cli = run("fit", tmp_path / "config.yaml", tmp_path, *no_logger)
    assert not cli.trainer.loggers
    assert {p.name for p in tmp_path.iterdir()} == {tiny.name, "config.yaml", "checkpoints"}
    assert (tmp_path / "config.yaml").read_text() == TINY
    with pytest.raises(InputError, match="holds the checkpoints of another run"):
        run("fit", tmp_path / "config.yaml", tmp_path, *no_logger)
    more = ("--trainer.logger", "false", "--trainer.max_steps", 2)
    checkpoint = ("--ckpt_path", "checkpoints/last.ckpt")
    cli = run("fit", tmp_path / "config.yaml", tmp_path, *more, *checkpoint)
    assert cli.trainer.global_step == 2


def test_every_option_of_ours_has_a_help_line(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    for option in ("--model.network.form", "--model.loss.ohem_threshold", "--wandb", "--name"):
        assert option in text
    # jsonargparse prints a missing description as nothing between the metavar and the type.
    names = ("model.", "panels.", "progress.", "predictions.", "wandb", "resume", "ema_decay")
    names += ("runs_dir", "name", "output")
    ours = [entry for entry in text.split("\n  --") if entry.startswith(names)]
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", "CamVid"])
    ours += capsys.readouterr().out.split("\n  --data.")[1:]
    assert len(ours) > 60
    for entry in ours:
        # "--crop_size [ITEM,...]", then what it is.
        words = re.sub(r"\s+\(type: .*", "", entry, flags=re.DOTALL).split()
        assert len(words) > 4, entry


def test_the_console_script_prints_one_message_and_no_stack_trace(tiny, tmp_path):
    command = [sys.executable, "-m", "isanet_pl", "validate", "--config", str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "isanet-pl: error: validate needs trained weights" in done.stderr
    assert "Traceback" not in done.stderr
