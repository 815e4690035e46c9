"""A real offline run of W&B's own core, read back from its file; and where W&B runs go."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from conftest import fails_naming
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from wandb.errors import AuthenticationError
from wandb_file import RunFile

from isanet_pl.__main__ import run as run_program
from isanet_pl.callbacks.dashboards import _log_tables, _of_one_size
from isanet_pl.callbacks.results import code_version
from isanet_pl.callbacks.wandb_run import RUN_ID, WandbRun, resolve_mode, wandb_logger
from isanet_pl.hardware import peak_memory

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
KEY = "0123456789" * 4
CLASSES = ["background", "red", "green", "blue", "yellow"]
SMALL = [
    *("--data.num_train", "8", "--data.num_eval", "5", "--data.batch_size", "2"),
    *("--data.eval_batch_size", "2", "--data.num_workers", "0"),
    *("--trainer.precision", "32-true", "--trainer.val_check_interval", "2"),
    *("--trainer.log_every_n_steps", "2", "--progress.every_n_steps", "2"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home for wandb's own files, without any key."""
    return tmp_path_factory.mktemp("home")


def environment(home, **more):
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return own | {"HOME": str(home), "OMP_NUM_THREADS": "1"} | more


def fit(folder, home, *options, **variables):
    """Runs the quick start, made tiny, in a process of its own; returns what it printed."""
    command = [sys.executable, "-m", "isanet_pl", "fit", "--config", str(QUICKSTART), *SMALL]
    variables = environment(home, **variables)
    done = subprocess.run(
        [*command, *options], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory, home):
    """The run folder of a fit with everything that W&B can get."""
    root = tmp_path_factory.mktemp("work")
    options = ("--wandb", "offline", "--wandb_run.log_checkpoint", "true")
    labels = {"WANDB_RUN_GROUP": "ablation", "WANDB_TAGS": "isa,seed0", "WANDB_PROJECT": "paper"}
    fit(root, home, *options, "--trainer.max_steps", "4", **labels)
    return root / "runs" / "quickstart" / "version_0"


@pytest.fixture(scope="module")
def run(folder):
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return RunFile(path)


def media(folder, path):
    (found,) = folder.glob(f"wandb/offline-run-*/files/{path}")
    return found


def table(folder, run, key):
    """Returns columns and rows of a table that was logged last under a name."""
    logged = [row for row in run.history if f"{key}/path" in row][-1]
    content = json.loads(media(folder, logged[f"{key}/path"]).read_text())
    return content["columns"], content["data"]


def test_metrics_are_logged_by_optimiser_step(run):
    assert run.metrics["*"].step_metric == "trainer/global_step"
    (memory,) = peak_memory(torch.device("cpu"))
    for key in ("train/loss", "train/grad_norm", "lr/new", "images_per_s", memory):
        assert sorted(run.values(key)) == [1, 3], key
        assert run.values(key)[1] > 0, key
    for key in ("val/miou", "val/macc", "val/aacc", "val/loss", "val/iou/red"):
        assert sorted(run.values(key)) == [2, 4], key


def test_summary_has_the_best_validation(run):
    scores = run.values("val/miou")
    assert run.values("val/best_miou") == {2: scores[2], 4: max(scores.values())}
    assert run.summary["val/best_miou",] == max(scores.values())


def test_config_is_the_saved_one_with_the_codes_version(folder, run):
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    logged = {key: value for key, value in run.config.items() if not key.startswith("_wandb")}
    assert logged.pop("git") == code_version()
    assert logged == saved
    assert json.loads((folder / "results.json").read_text())["git"] == code_version()


def test_name_project_group_and_tags(run):
    assert run.run.display_name == "quickstart-version_0"
    assert run.run.job_type == "fit"
    assert run.run.project == "paper"
    assert run.run.run_group == "ablation"
    assert list(run.run.tags) == ["isa", "seed0"]


def test_tables_hold_the_scores_and_the_confusion_matrix(folder, run):
    counts = np.loadtxt(folder / "confusion_val.csv", delimiter=",", skiprows=1, dtype=int)
    columns, rows = table(folder, run, "val/confusion_counts")
    assert columns == ["truth", *CLASSES]
    assert [row[0] for row in rows] == CLASSES
    assert [row[1:] for row in rows] == counts.tolist()

    columns, rows = table(folder, run, "val/classes")
    assert columns == ["class", "IoU", "accuracy", "pixels"]
    assert [row[0] for row in rows] == CLASSES
    scores = json.loads((folder / "results.json").read_text())["scores"]
    for (name, iou, accuracy, pixels), row, i in zip(rows, counts, range(5), strict=True):
        assert iou == pytest.approx(scores[f"iou/{name}"], abs=1e-6)
        assert pixels == row.sum()
        assert accuracy == (pytest.approx(row[i] / row.sum()) if row.sum() else None)


def test_bar_chart_shows_the_table(folder, run):
    chart = run.config["_wandb/visualize/val/iou_chart"]
    assert chart["panel_config"]["fieldSettings"] == {"label": "class", "value": "IoU"}
    assert "val/iou_chart_table" in json.dumps(chart)
    assert table(folder, run, "val/iou_chart_table") == table(folder, run, "val/classes")


def test_pictures_are_those_of_the_run_folder(folder, run):
    files = {"confusion": "confusion_val.png", "iou": "iou_val.png"}
    files["panels"] = "panels/val_step=000004.png"
    for key, file in files.items():
        logged = run.values(f"val/{key}/filenames")
        assert sorted(logged) == [2, 4]
        with Image.open(media(folder, logged[4][0])) as sent, Image.open(folder / file) as kept:
            assert np.array_equal(np.array(sent.convert("RGB")), np.array(kept))


def test_predictions_are_layers_over_the_same_images_each_time(folder, run):
    captions = run.values("val/predictions/captions")
    assert sorted(captions) == [2, 4]
    assert captions[2] == captions[4]
    assert len(set(captions[4])) == 4
    masks = run.values("val/predictions/all_masks")
    first, last = ([layers["truth"]["sha256"] for layers in masks[step]] for step in (2, 4))
    assert first == last
    for layers in masks[4]:
        assert set(layers) == {"truth", "prediction"}
        with Image.open(media(folder, layers["truth"]["path"])) as mask:
            assert set(np.unique(np.array(mask))) <= {*range(5), 255}
    labels = run.config["_wandb"]["mask/class_labels"]
    for layer in ("truth", "prediction"):
        named = labels[f"val/predictions_wandb_delimeter_{layer}"]["value"]
        assert named == {**{str(i): name for i, name in enumerate(CLASSES)}, "255": "ignored"}


def test_best_checkpoint_is_an_artifact(folder, run):
    (model,) = (artifact for artifact in run.artifacts if artifact.type == "model")
    assert "best" in model.aliases
    best = folder / "checkpoints" / "best.ckpt"
    (content,) = model.manifest.contents
    assert Path(content.local_path) == best.resolve()
    assert content.size == best.stat().st_size
    score = json.loads(model.metadata)["val/miou"]
    assert score == pytest.approx(max(run.values("val/miou").values()))


def test_resumed_fit_continues_the_same_run(folder, home, run):
    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)[RUN_ID] == run.run.run_id
    options = ("--ckpt_path", str(checkpoint), "--trainer.max_steps", "6")
    fit(folder.parents[2], home, "--wandb", "auto", *options)
    again = folder.parent / "version_1"
    (path,) = again.glob("wandb/offline-run-*/run-*.wandb")  # auto: there is no key
    continued = RunFile(path)
    assert continued.run.run_id == run.run.run_id
    assert continued.run.resume  # `wandb sync` then adds to the run
    assert not continued.run.display_name  # the name stays
    assert sorted(continued.values("train/loss")) == [5]
    scores = {**run.values("val/miou"), **continued.values("val/miou")}
    assert sorted(scores) == [2, 4, 6]
    assert continued.summary["val/best_miou",] == max(scores.values())
    assert not any(artifact.type == "model" for artifact in continued.artifacts)
    assert torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)[RUN_ID] == (
        run.run.run_id
    )
    # As a grid does: in the same folder, by the run's name.
    options = ("--resume", "true", "--trainer.max_steps", "8")
    fit(folder.parents[2], home, "--wandb", "auto", *options)
    parts = [RunFile(path) for path in again.glob("wandb/offline-run-*/run-*.wandb")]
    assert {part.run.run_id for part in parts} == {run.run.run_id}
    assert sorted(step for part in parts for step in part.values("val/miou")) == [6, 8]


def test_a_checkpoint_without_a_wandb_run_starts_one(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    torch.save({"global_step": 1}, checkpoint)
    folder = tmp_path / "quickstart" / "version_1"
    logger = wandb_logger("offline", "quickstart-version_1", folder, "fit", str(checkpoint))
    assert logger.version is None  # wandb makes an id
    assert logger._wandb_init["name"] == "quickstart-version_1"


def validated(callback, score, logger):
    """Tells a callback that a validation of a fit has ended."""
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        sanity_checking=False,
        callback_metrics={"val/miou": torch.tensor(score)},
        loggers=[logger],
    )
    callback.on_validation_end(trainer, SimpleNamespace(trained_steps=7))


class Board(WandbLogger):
    """Keeps what W&B would get; or W&B raises an error."""

    def __init__(self, error=None):
        self.logged, self.error = [], error

    def log_metrics(self, metrics, step=None):
        if self.error is not None:
            raise self.error
        self.logged.append((metrics, step))


def test_the_best_of_a_resumed_run_may_be_of_before():
    before, after, board = WandbRun(), WandbRun(), Board()
    validated(before, 0.75, board)
    after.load_state_dict(before.state_dict())
    validated(after, 0.5, board)
    assert board.logged == [({"val/best_miou": 0.75}, 7)] * 2


def test_a_server_that_does_not_answer_ends_no_training(caplog):
    error = AuthenticationError("no answer in 19 s")
    confusion, iou = torch.eye(2, dtype=torch.int64), {"a": 1.0, "b": 1.0}
    _log_tables(Board(error), confusion, iou, "val", 7)
    assert "W&B has not taken the tables of step 7" in caplog.text
    assert "no answer in 19 s" in caplog.text
    board = Board()
    _log_tables(board, confusion, iou, "val", 7)
    ((charts, step),) = board.logged
    assert (len(charts), step) == (3, 7)


def test_a_server_that_does_not_take_the_checkpoint_ends_no_run(tmp_path, caplog):
    def refuse(artifact, aliases):
        raise AuthenticationError("no answer in 19 s")

    best = ModelCheckpoint(monitor="val/miou")
    best.best_model_score, best.best_model_path = torch.tensor(0.5), str(tmp_path / "best.ckpt")
    (tmp_path / "best.ckpt").write_text("weights")
    board = MagicMock(spec=WandbLogger, version="abc")
    board.experiment.log_artifact = refuse
    trainer = SimpleNamespace(loggers=[board], checkpoint_callbacks=[best])
    WandbRun(log_checkpoint=True).on_fit_end(trainer, None)
    assert "W&B has not taken the best checkpoint" in caplog.text


def test_images_of_several_sizes_are_padded_to_one():
    def row(height, width):
        return torch.ones(3, height, width, dtype=torch.uint8), *torch.ones(2, height, width).long()

    rows = _of_one_size([row(4, 2), row(3, 5)])
    assert [[tuple(x.shape) for x in maps] for maps in rows] == [[(3, 4, 5), (4, 5), (4, 5)]] * 2
    (image, truth, prediction), _ = rows
    assert image[:, :, :2].eq(1).all()
    assert image[:, :, 2:].eq(0).all()
    for classes in (truth, prediction):
        assert classes[:, :2].eq(1).all()
        assert classes[:, 2:].eq(255).all()


# Where a run goes


def test_a_sweep_names_its_runs_itself(monkeypatch, tmp_path):
    for sweep, name in ((None, "quickstart-version_0"), ("abc", None)):
        if sweep is not None:
            monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        logger = wandb_logger("offline", "quickstart-version_0", tmp_path, "fit", None)
        assert logger._wandb_init["name"] == name


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without any key, and a wandb that has not looked for one yet."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")  # or it asks its server for a key's owner, and waits
    forget()
    yield monkeypatch
    forget()


def forget():
    import wandb
    from wandb.sdk.lib import wbauth

    wbauth.unauthenticate_session(update_settings=False)
    wandb.teardown()


def test_auto_is_online_only_where_there_is_a_key(nowhere, tmp_path):
    assert resolve_mode("auto") == "offline"
    nowhere.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode("auto") == resolve_mode("online") == "online"


def test_auto_finds_the_key_that_wandb_login_has_written(nowhere, tmp_path):
    path = tmp_path / "NETRC"
    path.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    path.chmod(0o600)
    assert resolve_mode("auto") == "online"


def test_auto_obeys_the_environment(nowhere):
    nowhere.setenv("WANDB_API_KEY", KEY)
    nowhere.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"


def test_off_and_offline_need_no_key(nowhere):
    assert resolve_mode("off") is None
    assert resolve_mode("offline") == "offline"


def test_online_without_a_key_is_refused_with_the_fix(nowhere):
    with fails_naming("--wandb online found no API key", "wandb login", "--wandb offline"):
        resolve_mode("online")


def test_online_against_the_environment_is_refused(nowhere):
    nowhere.setenv("WANDB_MODE", "offline")
    nowhere.setenv("WANDB_API_KEY", KEY)
    with fails_naming("WANDB_MODE is offline", "--wandb auto"):
        resolve_mode("online")


def test_a_missing_key_is_named_whatever_the_environment_says(nowhere):
    nowhere.setenv("WANDB_MODE", "online")
    with fails_naming("found no API key"):
        resolve_mode("online")


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_key_that_cannot_be_one_is_refused(nowhere, mode):
    nowhere.setenv("WANDB_API_KEY", "abc")
    with fails_naming("WANDB_API_KEY invalid", "--wandb offline"):
        resolve_mode(mode)


def test_a_refused_run_leaves_no_folder(tmp_path, nowhere, capsys):
    place = tmp_path / "place"
    place.mkdir()
    nowhere.chdir(place)
    arguments = ["isanet-pl", "fit", "--config", str(QUICKSTART), "--wandb", "online"]
    nowhere.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        run_program()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--wandb online found no API key" in said
    assert "Traceback" not in said
    assert not list(place.iterdir())
