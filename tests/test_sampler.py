"""Training samples as a numbered stream: one function of seed and number, whoever asks."""

import contextlib
import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from conftest import fails_naming, make_folder
from hypothesis import given
from hypothesis import strategies as st

from isanet_pl.data import SegmentationFolder
from isanet_pl.data.sampler import DrawLoader, DrawnSamples, DrawSampler, Position


class Numbers(torch.utils.data.Dataset):
    """Gives the index and a random number for each image."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index, float(torch.rand(()))


def draws_of(length, batch_size, *place):
    """Returns the draws of an epoch, batch by batch."""
    sampler = DrawSampler(DrawnSamples(Numbers(length), 0), batch_size, *place)
    draws = list(sampler)
    assert len(draws) == len(sampler)
    return [draws[i : i + batch_size] for i in range(0, len(draws), batch_size)]


def make_data(root, **arguments):
    arguments = {"batch_size": 2, "crop_size": (16, 20), "num_workers": 0, **arguments}
    data = SegmentationFolder(str(root), ["road", "car", "tree"], **arguments)
    torch.manual_seed(5)
    data.setup("fit")
    return data


@pytest.fixture
def five(tmp_path):
    return make_folder(tmp_path / "five", splits=["train", "val"], count=5)


def same(one, other):
    """Returns whether two batches hold the same images, masks, names and colours."""
    return (
        torch.equal(one["image"], other["image"])
        and torch.equal(one["mask"], other["mask"])
        and one["name"] == other["name"]
        and one["jitter"] == other["jitter"]
    )


# The stream


def test_a_sample_depends_on_seed_and_number_alone():
    samples = DrawnSamples(Numbers(7), 3)
    forwards = [samples[draw] for draw in range(30)]
    torch.rand(100)  # whatever was drawn before
    again = DrawnSamples(Numbers(7), 3)
    assert [again[draw] for draw in reversed(range(30))] == forwards[::-1]
    assert len({number for _, number in forwards}) == 30
    other = DrawnSamples(Numbers(7), 4)
    assert [other[draw] for draw in range(30)] != forwards


@given(length=st.integers(1, 60), seed=st.integers(0, 2**63))
def test_a_pass_shows_every_image_once(length, seed):
    samples = DrawnSamples(Numbers(length), seed)
    for number in range(3):
        seen = [samples.image_of(number * length + place) for place in range(length)]
        assert sorted(seen) == list(range(length))


def test_passes_have_their_own_order():
    samples = DrawnSamples(Numbers(20), 0)
    orders = {tuple(samples.image_of(20 * n + i) for i in range(20)) for n in range(10)}
    assert len(orders) == 10


def test_a_sample_leaves_the_random_numbers_of_the_process_alone():
    before = torch.get_rng_state()
    DrawnSamples(Numbers(7), 3)[11]
    assert torch.equal(torch.get_rng_state(), before)


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    num_ranks=st.integers(1, 4),
    accumulated=st.integers(1, 4),
    start=st.integers(0, 1000),
)
def test_ranks_share_out_the_batches_of_one_process(
    length, batch_size, num_ranks, accumulated, start
):
    one = draws_of(length, batch_size * num_ranks, Position(0, start), 0, 1, accumulated)
    ranks = [
        draws_of(length, batch_size, Position(0, start), rank, num_ranks, accumulated)
        for rank in range(num_ranks)
    ]
    together = [[draw for part in parts for draw in part] for parts in zip(*ranks, strict=True)]
    assert together == one
    steps = length // (batch_size * num_ranks * accumulated)
    assert len(one) == accumulated * max(1, steps)
    flat = [draw for batch in one for draw in batch]
    assert flat == list(range(start, start + len(flat)))


# The loader


@pytest.mark.parametrize("num_workers", [1, 3])
def test_loader_processes_change_nothing(five, num_workers):
    plain, parallel = make_data(five), make_data(five, num_workers=num_workers)
    loaders = plain.train_dataloader(), parallel.train_dataloader()
    for _ in range(3):  # epochs
        pairs = list(zip(*loaders, strict=True))
        assert len(pairs) == 2
        assert all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_takes_nothing_from_the_random_numbers_of_the_process(five, num_workers):
    data = make_data(five, num_workers=num_workers)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert len(list(loader)) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_is_that_of_training_and_not_of_what_was_prepared(five, num_workers):
    data = make_data(five, num_workers=num_workers)
    batches = iter(data.train_dataloader())
    assert data.state_dict() == {"seed": 5, "draw": 0}
    next(batches)
    assert data.state_dict() == {"seed": 5, "draw": 2}


@pytest.mark.parametrize("left", range(6))
def test_a_resumed_stream_is_the_one_that_was_left(five, left):
    def stream(data):
        loader = data.train_dataloader()
        while True:
            yield from loader

    whole = stream(make_data(five))
    expected = [next(whole) for _ in range(8)]
    stopped = make_data(five)
    batches = stream(stopped)
    for _ in range(left):
        next(batches)
    resumed = make_data(five)
    resumed._position = None  # whatever the seed of the process that goes on
    resumed.load_state_dict(stopped.state_dict())
    batches = stream(resumed)
    assert all(same(next(batches), batch) for batch in expected[left:])


def test_nothing_is_shown_twice_or_left_out_when_the_batch_changes(five):
    first = make_data(five)
    names = [name for batch in first.train_dataloader() for name in batch["name"]]
    second = make_data(five, batch_size=1)
    second.load_state_dict(first.state_dict())
    names += next(iter(second.train_dataloader()))["name"]
    assert len(set(names)) == 5


class Watched(pl.LightningModule):
    """Trains one number; notes the images of each step, and the steps that are validated.

    Saves a checkpoint after each step, as `LastCheckpoint` does.
    """

    def __init__(self, folder):
        super().__init__()
        self.number = torch.nn.Parameter(torch.ones(()))
        self.folder = folder
        self.names, self.steps, self.validated = [], [], []

    def training_step(self, batch, batch_idx):
        self.names += batch["name"]
        return self.number

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(self.names)
        self.names = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.names:
            self.trainer.save_checkpoint(self.folder / f"{self.trainer.global_step}.ckpt")

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_end(self):
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulated", [2, 3, 4, 7])  # of 5 batches to a pass
def test_every_step_sees_all_of_its_batches(five, tmp_path, accumulated):
    def fit(folder, checkpoint=None):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_steps=6,
            max_epochs=-1,
            accumulate_grad_batches=accumulated,
            val_check_interval=2 * accumulated,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            accelerator="cpu",
            enable_model_summary=False,
            **quiet,
        )
        watched = Watched(folder)
        trainer.fit(watched, make_data(five, batch_size=1), ckpt_path=checkpoint)
        return watched

    whole = fit(tmp_path)
    assert [len(names) for names in whole.steps] == [accumulated] * 6
    assert whole.validated == [2, 4, 6]
    shown = [name for names in whole.steps for name in names]
    assert all(len(set(shown[i : i + 5])) == 5 for i in range(0, len(shown) - 5, 5))
    for step in (1, 3):
        resumed = fit(tmp_path / "resumed", tmp_path / f"{step}.ckpt")
        assert resumed.steps == whole.steps[step:]
        assert resumed.validated == [at for at in (2, 4, 6) if at > step]


def test_another_sampler_leaves_the_position(five):
    samples, position = DrawnSamples(Numbers(4), 0), Position(0)
    sequential = torch.utils.data.SequentialSampler(samples)
    assert len(list(DrawLoader(samples, 2, sampler=sequential))) == 2
    sampler = DrawSampler(samples, 2, position)
    assert len(list(DrawLoader(samples, 2, sampler=sampler))) == 2
    assert position.draw == 4


def test_a_loader_process_outlives_sigterm_for_a_while(five, monkeypatch):
    monkeypatch.setattr("isanet_pl.data.sampler.GRACE_SECONDS", 6)
    data = make_data(five, num_workers=1)
    loader = data.val_dataloader()
    assert len(list(loader)) == 5
    (worker,) = loader._iterator._workers
    worker.terminate()
    assert len(list(loader)) == 5  # of the same process: they are kept from epoch to epoch
    assert worker.is_alive()
    with contextlib.suppress(RuntimeError):  # torch may be faster to notice, and raises
        worker.join(timeout=20)
    worker.join(timeout=20)
    assert worker.exitcode == -signal.SIGALRM


def test_a_new_fit_starts_a_new_stream(five):
    data = make_data(five)
    list(data.train_dataloader())
    torch.manual_seed(6)
    data.setup("fit")
    assert data.state_dict() == {"seed": 6, "draw": 0}


def test_processes_share_one_stream_whatever_their_seeds(five):
    """As with `--seed_everything false`, where each has one of its own."""
    data = make_data(five)
    first = SimpleNamespace(broadcast=lambda seed: 7)
    data.trainer = SimpleNamespace(
        global_rank=1, world_size=2, strategy=first, limit_val_batches=1.0
    )
    data.setup("fit")
    assert data.state_dict() == {"seed": 7, "draw": 0}


def test_evaluation_has_no_position(five):
    data = SegmentationFolder(str(five), ["road", "car", "tree"])
    data.setup("validate")
    assert data.state_dict() == {}


def test_too_few_images_for_the_devices_are_refused(five):
    class Trainer:
        global_rank, world_size, limit_val_batches = 0, 4, 1.0

    data = SegmentationFolder(str(five), ["road", "car", "tree"], batch_size=2)
    data.trainer = Trainer()
    with fails_naming("5 images", "one batch of 2 on 4 devices", "--data.batch_size 1"):
        data.setup("fit")
