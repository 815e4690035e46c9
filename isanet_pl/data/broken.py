"""Training on in spite of broken files, as long as they are few."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

from isanet_pl.errors import InputError

log = logging.getLogger(__name__)

MOST = 0.01
"""Share of the samples of a pass over the images that may be replaced."""


class BrokenFiles:
    """Names each broken file once, and ends a run that loses too many of its samples.

    Args:
        num_images: Samples of a pass over the images.
        images_per_batch: Samples of a batch, over all ranks.
        add_up: Returns the sum of a number over all ranks.
    """

    def __init__(
        self, num_images: int, images_per_batch: int, add_up: Callable[[int], int]
    ) -> None:
        self.num_images = num_images
        self.add_up = add_up
        self.known: dict[str, None] = {}  # what was said, in order
        # Of each batch of the last pass, the samples that were replaced.
        self.replaced: deque[int] = deque(maxlen=math.ceil(num_images / images_per_batch))

    def take(self, errors: Sequence[Sequence[str]]) -> None:
        """Takes note of a batch.

        Args:
            errors: For each sample of this rank, why those that it stands in for could not be read.

        Raises:
            InputError: More than 1 % of the last pass were replaced.
        """
        for error in (error for sample in errors for error in sample):
            if error not in self.known:
                self.known[error] = None
                log.warning("%s. Training goes on with other samples in its place", error)
        self.replaced.append(self.add_up(sum(1 for sample in errors if sample)))
        if sum(self.replaced) > MOST * self.num_images:
            raise InputError(
                f"{sum(self.replaced)} of the {self.num_images} training samples of a pass were "
                f"replaced, more than {MOST:.0%}, as --data.on_error skip allows; such as: "
                f"{next(iter(self.known), 'on another rank')}. scripts/check_dataset.py names all "
                "broken files: restore or remove them"
            )
