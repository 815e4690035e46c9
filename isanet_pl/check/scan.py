"""Reads all files of a data set, in parallel."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from isanet_pl.check.facts import SplitFacts
from isanet_pl.data.files import Pair
from isanet_pl.errors import InputError
from isanet_pl.hardware import num_cores

CHUNK = 4
"""Pairs that a process reads at a time: few, so that Ctrl-C need not wait for many."""
Reader = Callable[[Sequence[Pair]], SplitFacts]
Mapper = Callable[[Reader, Iterable[Sequence[Pair]]], Iterable[SplitFacts]]


def scan(
    pairs: Mapping[str, Sequence[Pair]],
    read: Reader,
    workers: int | None = None,
    advance: Callable[[str, int], None] = lambda split, count: None,
) -> dict[str, SplitFacts]:
    """Returns the facts of each split, the same ones for any number of workers.

    Args:
        pairs: The files of each split.
        read: Returns the facts of some pairs; a process must be able to import it.
        workers: Processes; None: one for each core; 1: this one alone.
        advance: Called with the split and the number of pairs that were read meanwhile.

    Raises:
        InputError: There are no workers, or one of them was killed.
    """
    workers = num_cores() if workers is None else workers
    if workers < 1:
        raise InputError(f"at least one process is needed, got --workers {workers}")
    chunks = {s: [p[i : i + CHUNK] for i in range(0, len(p), CHUNK)] for s, p in pairs.items()}
    facts = {split: SplitFacts() for split in pairs}
    try:
        with _process_map(min(workers, sum(map(len, chunks.values())))) as mapper:
            for split in pairs:
                for part in mapper(read, chunks[split]):
                    facts[split].add(part)
                    advance(split, part.num_pairs)
    except BrokenProcessPool as error:
        raise InputError(
            "a process that reads files was killed, most likely for want of memory: try --workers 1"
        ) from error
    return facts


@contextmanager
def _process_map(workers: int) -> Iterator[Mapper]:
    """Gives a `map` that works in processes; for one worker the plain one."""
    if workers <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        yield pool.map
    finally:  # after Ctrl-C as well: drop what has not been begun
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    # Whatever the main process does with it: the pool ends its processes by it, and waits for them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
