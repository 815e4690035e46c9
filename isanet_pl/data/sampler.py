"""Training samples as one endless, numbered stream, which a run can leave and take up anywhere.

Sample number i depends on the seed and on i alone: not on the number of loader processes, ranks or
images in a batch, nor on what was drawn before it. All that a checkpoint needs is the next number.
"""

import signal
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from isanet_pl.data.dataset import Sample
from isanet_pl.errors import InputError

# What a random number of the stream is for: the order of the images, one sample, or the images that
# stand in for one that cannot be read.
ORDER, SAMPLE, REPLACEMENT = 0, 1, 2

GRACE_SECONDS = 30
"""How long a loader process lives after SIGTERM."""

ATTEMPTS = 10
"""Images that are tried in the place of one: so many broken ones in a row are no accident."""


@dataclass
class Position:
    """A place in a stream.

    Args:
        seed: Of the stream, at least 0.
        draw: Number of the next sample, counted over all ranks.
    """

    seed: int
    draw: int = 0


class DrawnSamples(Dataset[Sample]):
    """The stream: item i, for any i >= 0, is the sample of draw i.

    Every `len(dataset)` draws are one pass over the images in a new order. Passes follow each other
    without a gap, so that no image is ever left out, whatever the size of a batch.

    Args:
        dataset: Samples by image; its random numbers must be torch's.
        seed: Of the stream.
        skip_broken: Put the sample of another image in the place of one that cannot be read, again
            a function of seed and draw, and the reason into its `replaced`.
    """

    def __init__(self, dataset: Dataset[Sample], seed: int, skip_broken: bool = False) -> None:
        assert isinstance(dataset, Sized)
        self.dataset = dataset
        self.seed = seed
        self.skip_broken = skip_broken
        self.length = len(dataset)
        self._order = (-1, np.empty(0, dtype=np.int64))  # of the pass in use

    def __len__(self) -> int:
        """Returns the number of images: the draws of one pass."""
        return self.length

    def image_of(self, draw: int) -> int:
        """Returns the index of the image that a draw shows."""
        number, place = divmod(draw, self.length)
        if self._order[0] != number:
            order = np.random.default_rng((self.seed, ORDER, number)).permutation(self.length)
            self._order = (number, order)
        return int(self._order[1][place])

    def __getitem__(self, draw: int) -> Sample:
        (number,) = np.random.SeedSequence((self.seed, SAMPLE, draw)).generate_state(1)
        # Without loader processes these are the numbers that dropout goes on with: give them back.
        with torch.random.fork_rng(devices=[]):
            if self.skip_broken:
                return self._first_readable(draw, int(number))
            torch.default_generator.manual_seed(int(number))
            return self.dataset[self.image_of(draw)]

    def _first_readable(self, draw: int, number: int) -> Sample:
        """Returns the sample of a draw, or of another image if its own cannot be read.

        Raises:
            InputError: Nor can any of the others that are tried.
        """
        rng = np.random.default_rng((self.seed, REPLACEMENT, draw))
        images = [self.image_of(draw), *rng.integers(self.length, size=ATTEMPTS).tolist()]
        errors: list[InputError] = []
        for image in images:
            torch.default_generator.manual_seed(number)
            try:
                sample = self.dataset[image]
            except InputError as error:
                errors.append(error)
            else:
                sample["replaced"] = [str(error) for error in errors]
                return sample
        raise errors[-1]


class DrawSampler(DistributedSampler[int]):
    """Yields the draws of one rank for an epoch, from where the stream stands.

    Batch j of an epoch is the same set of draws whatever the number of ranks: they share it out.
    An epoch is a pass over the images, rounded down to whole optimiser steps, but at least one.

    Args:
        samples: The stream.
        batch_size: Images of a batch on one rank.
        position: Where the stream stands; `DrawLoader` moves it.
        rank: This process.
        num_ranks: Processes.
        accumulated: Batches of an optimiser step.
    """

    # A DistributedSampler, for Lightning leaves those as they are where there are several ranks.
    def __init__(
        self,
        samples: DrawnSamples,
        batch_size: int,
        position: Position,
        rank: int = 0,
        num_ranks: int = 1,
        accumulated: int = 1,
    ) -> None:
        super().__init__(samples, num_ranks, rank, shuffle=False, drop_last=True)
        self.batch_size = batch_size
        self.images_per_batch = batch_size * num_ranks
        self.position = position
        # Lightning steps at the end of an epoch, however few batches it has accumulated by then.
        num_steps = len(samples) // (self.images_per_batch * accumulated)
        self.num_batches = max(1, num_steps) * accumulated

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.position.draw + self.rank * self.batch_size
        for batch in range(self.num_batches):
            start = first + batch * self.images_per_batch
            yield from range(start, start + self.batch_size)


class DrawLoader(DataLoader[Sample]):
    """Moves the position of its `DrawSampler` with each batch that it hands out.

    The sampler cannot do it: it is ahead by the batches that the loader processes prepare.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names a private class
        return self._counted(super().__iter__())  # its processes start now, not at the first batch

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if isinstance(self.sampler, DrawSampler):  # --trainer.overfit_batches puts in another
                self.sampler.position.draw += self.sampler.images_per_batch
            yield batch


def outlive_termination(worker: int) -> None:
    """Lets a loader process live on for a while after SIGTERM, so that the main process can save.

    The end of a job is announced to all of its processes. That this one ends all the same matters
    where the main process waits for it, having sent the signal itself, as Python's exit does.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
