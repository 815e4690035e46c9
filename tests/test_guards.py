"""What ends a run before it does harm: numbers that are not finite, and too many broken files."""

import errno
import os
import shutil

import lightning.pytorch as pl
import pytest
import torch
from conftest import fails_naming, make_folder, truncate
from test_module import make_loader, make_module, make_trainer

from isanet_pl.callbacks.last_checkpoint import LastCheckpoint
from isanet_pl.data import SegmentationFolder
from isanet_pl.data.broken import BrokenFiles
from isanet_pl.data.sampler import ATTEMPTS, DrawnSamples
from isanet_pl.errors import InputError
from isanet_pl.finite import first_not_finite, largest

# Numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_among_many_is_found(value, dtype):
    tensors = {"a": torch.ones(3, 4, dtype=dtype), "b": torch.zeros(5), "n": torch.tensor(7)}
    assert largest(tensors.values()).isfinite()
    assert first_not_finite(tensors) is None
    tensors["a"][2, 1] = value
    assert not largest(tensors.values()).isfinite()
    assert first_not_finite(tensors) == "a"


def test_large_numbers_are_finite():
    large = torch.full((1000,), 3e38)  # whose squares overflow
    assert largest([large]).isfinite()
    assert first_not_finite({"large": large}) is None


class After(pl.Callback):
    """Does something to the module after a step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            self.change(pl_module)


def test_gradient_names_the_images_of_all_accumulated_batches(tmp_path):
    module, calls = make_module(), []

    def poison(gradient):
        calls.append(len(calls))
        return gradient * float("inf") if len(calls) == 3 else gradient

    module.network.classifier.weight.register_hook(poison)
    # The third batch of two, in the second step; the fourth is still added to it.
    name = r"network\.classifier\.weight"
    images = "image4, image5, image6, image7"
    with pytest.raises(InputError, match=rf"step 1: a gradient .*\({name}\) on {images}\. N"):
        make_trainer(tmp_path, accumulate_grad_batches=2).fit(module, make_loader())


def overflow(module):
    with torch.no_grad():
        module.network.backbone.net.conv1.weight.mul_(1e20)


def test_a_statistic_that_overflows_stops_the_run(tmp_path):
    # The loss stays finite: what is divided by an infinite deviation is zero.
    module = make_module()
    trainer = make_trainer(tmp_path, callbacks=[After(2, overflow)])
    name = r"network\.backbone\.net\.bn1\.running_var"
    with pytest.raises(InputError, match=rf"step 2: a statistic .*\({name}\) on image4, image5"):
        trainer.fit(module, make_loader())
    assert torch.as_tensor(trainer.callback_metrics["train/loss"]).isfinite()


@pytest.mark.parametrize("name", ["classifier.weight", "backbone.net.bn1.running_mean"])
def test_no_checkpoint_holds_what_is_not_finite(tmp_path, name):
    module = make_module()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_loader())
    module.network.state_dict()[name][0] = torch.nan
    for weights_only in (False, True):
        with fails_naming("step 1: a weight is not finite", f"(network.{name})"):
            trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert not (tmp_path / "a.ckpt").exists()


def test_raw_weights_beside_an_average_are_looked_at_too():
    module = make_module()
    state = {**module.state_dict(), "network.classifier.bias": torch.tensor([torch.inf, 0, 0])}
    module.trainer = pl.Trainer(logger=False, accelerator="cpu")
    with fails_naming("a weight is not finite", "network.classifier.bias"):
        module.on_save_checkpoint({"state_dict": module.state_dict(), "current_model_state": state})


def test_a_run_that_fails_names_its_last_good_checkpoint(tmp_path, caplog):
    keep = LastCheckpoint(every_n_steps=1)
    trainer = make_trainer(
        tmp_path, callbacks=[After(2, overflow), keep], enable_checkpointing=True
    )
    with caplog.at_level("WARNING", logger="isanet_pl"), pytest.raises(InputError):
        trainer.fit(make_module(), make_loader())
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"the last good checkpoint is of step 2: {last}" in caplog.text
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 2
    assert largest(state["state_dict"].values()).isfinite()


# Broken files


def add_up_alone(number):
    return number


def test_one_percent_of_a_pass_may_be_replaced_and_no_more(caplog):
    files = BrokenFiles(num_images=200, images_per_batch=4, add_up=add_up_alone)
    fine, broken = [[], [], [], []], [[], ["a.png is broken"], [], []]
    for _ in range(3):  # passes
        for step in range(50):
            files.take(broken if step in (10, 20) else fine)
    assert caplog.text.count("a.png is broken") == 1
    # Two of the last pass are allowed; the third comes while the first is still in it.
    for _ in range(10):
        files.take(fine)
    files.take(broken)
    with fails_naming("3 of the 200 training samples", "more than 1%", "a.png", "check_dataset"):
        files.take(broken)


def test_a_sample_that_took_several_attempts_counts_once():
    files = BrokenFiles(num_images=100, images_per_batch=2, add_up=add_up_alone)
    files.take([["a.png is broken", "b.png is broken"], []])
    assert list(files.replaced) == [1]


def test_every_rank_counts_what_all_of_them_replaced():
    files = BrokenFiles(num_images=100, images_per_batch=4, add_up=lambda number: number + 2)
    with fails_naming("2 of the 100", "on another rank"):
        files.take([[], []])


@pytest.fixture
def broken_folder(tmp_path):
    root = make_folder(tmp_path / "data", splits=("train", "val"), count=12)
    for index in (1, 5):
        truncate(root / "train" / "images" / f"scene{index}.png")
    return root


def make_data(root, num_workers=0, **options):
    torch.manual_seed(0)
    names = ["a", "b", "c"]
    data = SegmentationFolder(
        str(root), names, batch_size=2, crop_size=(16, 16), num_workers=num_workers, **options
    )
    data.setup("fit")
    return data


def batches_of(data, passes=2):
    loader = data.train_dataloader()
    return [batch for _ in range(passes) for batch in loader]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one["name"] == other["name"]
        assert one["replaced"] == other["replaced"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])


def test_replacements_depend_on_seed_and_draw_alone(broken_folder, tmp_path):
    expected = batches_of(make_data(broken_folder, on_error="skip"))
    replaced = [errors for batch in expected for errors in batch["replaced"] if errors]
    assert len(replaced) >= 4  # both files in both passes
    assert {error.split(":")[0].split("/")[-1] for e in replaced for error in e} == {
        "scene1.png",
        "scene5.png",
    }
    shown = {name.split("/")[-1] for batch in expected for name in batch["name"]}
    assert not shown & {"scene1.png", "scene5.png"}
    assert_same(batches_of(make_data(broken_folder, num_workers=2, on_error="skip")), expected)
    cached = make_data(broken_folder, on_error="skip", cache=str(tmp_path / "cache"))
    assert_same(batches_of(cached), expected)
    resumed = make_data(broken_folder, on_error="skip")
    resumed.load_state_dict({"seed": 0, "draw": 12})
    assert_same(batches_of(resumed, passes=1), expected[6:])


def test_skipping_leaves_the_samples_of_whole_files_as_they_are(broken_folder):
    skipped = batches_of(make_data(broken_folder, on_error="skip"))
    for index in (1, 5):
        shutil.copy(
            broken_folder / "val" / "images" / f"scene{index}.png",
            broken_folder / "train" / "images" / f"scene{index}.png",
        )
    mended = batches_of(make_data(broken_folder))
    assert all("replaced" not in batch for batch in mended)
    for one, other in zip(skipped, mended, strict=True):
        for place, errors in enumerate(one["replaced"]):
            if not errors:
                assert one["name"][place] == other["name"][place]
                assert torch.equal(one["image"][place], other["image"][place])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_cache_disk_is_said_once_and_skips_no_image(
    broken_folder, tmp_path, monkeypatch, caplog, num_workers
):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = batches_of(make_data(broken_folder, on_error="skip"))
    options = {"on_error": "skip", "cache": str(tmp_path / "cache"), "num_workers": num_workers}
    data = make_data(broken_folder, **options)
    monkeypatch.setattr(os, "fsync", fail)
    batches = batches_of(data)
    assert_same(batches, expected)
    data._broken = None  # which would end the run for two broken files of so few
    for batch in batches:
        data.on_after_batch_transfer(batch, 0)
    said = [record.getMessage() for record in caplog.records if "--data.cache" in record.msg]
    assert len(said) == 1
    assert f"--data.cache {tmp_path / 'cache'}: No space left on device" in said[0]


def test_draws_in_which_nothing_can_be_read_raise():
    class Broken(torch.utils.data.Dataset):
        tried = 0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            self.tried += 1
            raise InputError("a.png is broken")

    dataset = Broken()
    with pytest.raises(InputError, match=r"a\.png is broken"):
        DrawnSamples(dataset, seed=0, skip_broken=True)[0]
    assert dataset.tried == 1 + ATTEMPTS


def test_evaluation_never_skips(broken_folder):
    truncate(broken_folder / "val" / "images" / "scene3.png")
    data = SegmentationFolder(str(broken_folder), ["a", "b", "c"], on_error="skip", num_workers=0)
    with fails_naming("val/images/scene3.png"):
        data.setup("validate")
        list(data.val_dataloader())
