"""Pictures of a run: scores of the classes, the same images each time."""

import csv
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from test_module import NAMES, make_loader, make_module

from isanet_pl.callbacks.dashboards import ClassScores, PredictionPanels


class Predicts(pl.Callback):
    """Counts on its own what the network says about the images of a validation."""

    def __init__(self):
        self.counts = np.zeros((3, 3), dtype=int)

    def on_validation_epoch_start(self, trainer, pl_module):
        self.counts[:] = 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        for truth, prediction in zip(batch["mask"].flatten(), outputs.flatten(), strict=True):
            if truth != 255:
                self.counts[truth, prediction] += 1


class Board(TensorBoardLogger):
    """Takes what would go to TensorBoard, which need not be installed."""

    def __init__(self, folder):
        self.folder, self.shown, self.step = folder, [], 0

    @property
    def log_dir(self):
        return str(self.folder)

    @property
    def experiment(self):
        return self

    def add_image(self, key, pixels, step, dataformats):
        self.shown.append((key, pixels.shape, pixels.dtype, step, dataformats))

    def log_metrics(self, metrics, step=None):
        pass

    def log_graph(self, model, input_array=None):
        pass

    def save(self):
        pass

    def finalize(self, status):
        pass


def fit(logger, *extra, steps=4, **options):
    options = {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": 2,
        "enable_progress_bar": False,
    } | options
    trainer = pl.Trainer(
        logger=logger,
        callbacks=[PredictionPanels(), ClassScores(), *extra],
        accelerator="cpu",
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
    module = make_module()
    trainer.fit(module, make_loader(), make_loader(5))
    return trainer, module


def test_confusion_matrix_of_the_last_validation_is_in_the_run_folder(tmp_path):
    counter = Predicts()
    fit(CSVLogger(tmp_path, "run", "v"), counter)
    rows = list(csv.reader((tmp_path / "run" / "v" / "confusion_val.csv").open()))
    assert rows[0] == list(NAMES)
    assert np.array(rows[1:], dtype=int).tolist() == counter.counts.tolist()
    assert counter.counts.sum() == 5 * 16 * 16
    for name in ("confusion_val.png", "iou_val.png"):
        with Image.open(tmp_path / "run" / "v" / name) as picture:
            assert picture.format == "PNG"


def test_validate_and_test_have_pictures_of_their_own_and_the_step_of_the_weights(tmp_path):
    _, module = fit(CSVLogger(tmp_path, "fit", "v"))
    module.loaded_step = 4
    logger = CSVLogger(tmp_path, "test", "v")
    trainer = pl.Trainer(
        logger=logger,
        callbacks=[PredictionPanels(), ClassScores()],
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.test(module, make_loader(5), verbose=False)
    folder = tmp_path / "test" / "v"
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")}
    assert {"confusion_test.csv", "confusion_test.png", "iou_test.png"} < written
    assert "panels/test_step=000004.png" in written
    assert not any("val" in name for name in written)
    (row,) = csv.DictReader((folder / "metrics.csv").open())
    assert row["step"] == "4"


def test_validations_are_logged_at_the_steps_behind_the_weights(tmp_path):
    fit(CSVLogger(tmp_path, "run", "v"), log_every_n_steps=1)
    rows = list(csv.DictReader((tmp_path / "run" / "v" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["val/miou"]] == ["2", "4"]
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3"]


def test_gradient_norm_is_logged_before_clipping(tmp_path):
    norms = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append(sum(p.grad.pow(2).sum() for p in pl_module.parameters()) ** 0.5)

    options = {"log_every_n_steps": 1, "gradient_clip_val": 1e-3}
    fit(CSVLogger(tmp_path, "run", "v"), Watch(), steps=2, **options)
    rows = csv.DictReader((tmp_path / "run" / "v" / "metrics.csv").open())
    logged = [float(row["train/grad_norm"]) for row in rows if row["train/grad_norm"]]
    assert logged == pytest.approx([float(norm) for norm in norms], rel=1e-4)
    assert min(logged) > 1e-2


def test_tensorboard_gets_the_pictures_of_the_run_folder(tmp_path):
    board = Board(tmp_path)
    fit(board)
    shown = {(key, step) for key, _, _, step, _ in board.shown}
    keys = ("val/panels", "val/confusion", "val/iou")
    assert shown == {(key, step) for key in keys for step in (2, 4)}
    sizes = {key: shape for key, shape, _, step, _ in board.shown if step == 4}
    for key, file in zip(keys, ("panels/val_step=000004", "confusion_val", "iou_val"), strict=True):
        with Image.open(tmp_path / f"{file}.png") as picture:
            assert (picture.height, picture.width, 3) == sizes[key]
    kinds = {(dtype, layout) for _, _, dtype, _, layout in board.shown}
    assert kinds == {(np.dtype("uint8"), "HWC")}


def test_nothing_is_drawn_without_a_logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(False)
    assert not list(tmp_path.iterdir())


def chosen(batch_size, processes=1, total=11, num_images=3, limit=None):
    """Returns the names of the images that the first process keeps, of `total` in the split."""
    panels = PredictionPanels(num_images)
    own = [f"image{i}" for i in range(0, total, processes)]
    batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)][:limit]
    trainer = SimpleNamespace(
        is_global_zero=True,
        sanity_checking=False,
        world_size=processes,
        num_val_batches=[len(batches)],
        val_dataloaders=SimpleNamespace(batch_size=batch_size, dataset=range(total)),
    )
    for index, names in enumerate(batches):
        pixels = torch.zeros(len(names), 1, 2, 2)
        batch = {"image": pixels, "mask": pixels[:, 0], "name": names}
        panels.on_validation_batch_end(trainer, None, pixels[:, 0], batch, index)
    return panels.names


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_panels_show_the_same_images_at_any_batch_size(batch_size):
    assert chosen(batch_size) == ["image1", "image5", "image9"]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_with_several_processes_the_nearest_images_of_the_first(batch_size):
    assert chosen(batch_size, processes=2) == ["image0", "image4", "image8"]
    assert chosen(batch_size, processes=4) == ["image0", "image4", "image8"]


def test_panels_of_few_images():
    assert chosen(2, total=2) == ["image0", "image1"]
    assert chosen(2, num_images=0) == []
    assert chosen(2, total=100, limit=2) == ["image0", "image2", "image3"]


def test_panels_show_the_images_that_were_chosen(tmp_path):
    shown = []

    class Keep(PredictionPanels):
        def _show(self, trainer, pl_module, stage):
            shown.append((list(self.names), [image for image, _, _ in self.rows]))
            self.rows, self.names = [], []

    _, module = fit(False)
    trainer = pl.Trainer(
        callbacks=[Keep(2)], logger=False, accelerator="cpu", enable_progress_bar=False
    )
    loader = make_loader(5)
    trainer.validate(module, loader, verbose=False)
    trainer.validate(module, loader, verbose=False)
    for names, images in shown:
        assert names == ["image1", "image3"]
        for name, image in zip(names, images, strict=True):
            assert torch.equal(image, loader.dataset[int(name[-1])]["image"])
    assert len(shown) == 2
