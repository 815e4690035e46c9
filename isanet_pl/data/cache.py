"""Decoded pairs on disk, as plain bytes that are mapped into memory: a crop reads only its rows."""

import contextlib
import errno
import logging
import os
import shutil
import struct
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from isanet_pl.data.files import Pair, displayed_size
from isanet_pl.errors import InputError

# An entry is its facts, their and the pixels' CRC32, zeros up to HEADER, the image (H, W, 3) and
# the mask (H, W). Facts: MAGIC; H, W; size and mtime_ns of the image file, then of the mask file.
MAGIC = b"isanet\0\1"  # the last byte is the version of all this
FACTS = struct.Struct("<8s6q")
CHECKSUM = struct.Struct("<I")
HEADER = 4096  # one page: the pixels begin on the next

SAMPLES = 500  # images at most whose headers give the estimate of the space
MARGIN = 1.05  # on that estimate, for those that were not sampled
RESERVE = 2**28  # bytes to leave free, for what else is written during a run
LEFTOVER_AGE = 3600.0  # seconds; writing an entry takes a small part of that

log = logging.getLogger(__name__)


class DecodedCache:
    """Gives decoded pairs, each from a file of its own that is written at the first reading.

    Any number of processes may share a folder: a file gets its name only once it is complete, and
    whoever makes it again writes the same. Entries that are damaged, or whose sources have changed,
    are made again. Nothing is ever removed: to be rid of the cache, delete its folder.

    An entry that cannot be written is the last that is tried, in this process and those that it has
    started: what the disk still takes is left to checkpoints, and pairs without an entry are
    decoded each time.

    Args:
        folder: Where the entries are; made when needed.
        key: Stands for how masks become classes. Entries of another key are not seen.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder = folder.absolute()
        self.key = blake2b(key).digest()
        self._checked: dict[str, int] = {}  # mtime_ns of the entries whose checksum was right
        self._error = torch.zeros((), dtype=torch.int64)  # the system's number of it
        self._error.share_memory_()  # type: ignore[no-untyped-call]
        _remove_leftovers(self.folder)

    @property
    def failure(self) -> str | None:
        """Returns why entries are not written any more, in the system's words; None: they are."""
        number = int(self._error)
        return os.strerror(number) if number else None

    def check_space(self, pairs: Sequence[Pair]) -> None:
        """Makes sure that those of the pairs that are not cached yet fit on the disk.

        Args:
            pairs: Of all splits that the run reads.

        Raises:
            InputError: They do not fit, or nothing can be written.
        """
        sample = pairs[:: -(-len(pairs) // SAMPLES) or 1]
        try:
            missing = [pair[0] for pair in sample if not self._path(pair).exists()]
            if not missing:  # so a complete cache may be read-only
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(
                f"cannot write to --data.cache {self.folder}: {error.strerror}; name a folder that "
                "can be written, or run without --data.cache"
            ) from error
        sampled = 0
        for image in missing:
            with contextlib.suppress(InputError):  # it will never be cached; its reader names it
                sampled += _entry_size(*displayed_size(image))
        needed = int(MARGIN * sampled * len(pairs) / len(sample))
        if needed + RESERVE > free:
            raise InputError(
                f"--data.cache {self.folder} needs {_readable(needed)} for the decoded images and "
                f"{_readable(RESERVE)} to spare, but {_readable(free)} are free on its disk: make "
                "space, name a folder on another disk, or run without --data.cache"
            )

    def read(
        self, pair: Pair, decode: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Returns image (3, H, W), in memory (H, W, 3), and mask (H, W) of a pair, both uint8.

        Writing to them does not change the file.

        Args:
            pair: The files.
            decode: Returns image (3, H, W) and mask (H, W) of the files, uint8; called only if
                there is no valid entry.

        Raises:
            InputError: A file of the pair is gone.
        """
        source = _source(pair)  # before decoding: a change during it will be seen
        path = self._path(pair)
        entry = self._load(path, source)
        if entry is None:
            image, mask = decode()
            entry = image.permute(1, 2, 0).contiguous(), mask.contiguous()
            if self.failure is None:
                self._store(path, source, *entry)
        pixels, mask = entry
        return pixels.permute(2, 0, 1), mask

    def _path(self, pair: Pair) -> Path:
        names = b"\0".join(bytes(path.resolve()) for path in pair)
        name = blake2b(names, digest_size=16, key=self.key).hexdigest()
        return self.folder / name[:2] / f"{name}.bin"

    def _load(self, path: Path, source: list[int]) -> tuple[Tensor, Tensor] | None:
        """Returns image (H, W, 3) and mask (H, W) of an entry; None if it is missing or invalid."""
        try:
            stat = path.stat()
            # Mapped privately: writable, but not to the file. Unlike mmap it keeps no descriptor.
            content = torch.from_file(str(path), shared=False, size=stat.st_size, dtype=torch.uint8)
            facts = bytes(content[: FACTS.size].numpy())
            magic, height, width, *seen = FACTS.unpack(facts)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, struct.error) as error:
            log.debug("made again, as it cannot be read: %s (%s)", path, error)
            return None
        if magic != MAGIC or seen != source or len(content) != HEADER + 4 * height * width:
            log.debug("made again, as it is incomplete or its sources have changed: %s", path)
            return None
        pixels = content[HEADER:]
        # Once in a process, since it reads all of the file, and again if the file was replaced.
        if self._checked.get(path.name) != stat.st_mtime_ns:
            (checksum,) = CHECKSUM.unpack_from(content.numpy().data, FACTS.size)
            if checksum != _checksum(facts, pixels):
                log.warning("made again, as it is damaged (wrong checksum): %s", path)
                return None
            self._checked[path.name] = stat.st_mtime_ns
        area = height * width
        return pixels[: 3 * area].view(height, width, 3), pixels[3 * area :].view(height, width)

    def _store(self, path: Path, source: list[int], image: Tensor, mask: Tensor) -> None:
        """Writes image (H, W, 3) and mask (H, W), both contiguous, as an entry, if it can.

        If not, it raises nothing: an InputError would be taken for one of the pair's files.
        """
        height, width = mask.shape
        assert image.shape == (height, width, 3)
        facts = FACTS.pack(MAGIC, height, width, *source)
        header = facts + CHECKSUM.pack(_checksum(facts, image, mask))
        # Above the entries' folders, so that leftovers are found without listing every entry.
        temporary = self.folder / f"{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                for part in (header.ljust(HEADER, b"\0"), image.numpy().data, mask.numpy().data):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            self._error.fill_(error.errno or errno.EIO)
        finally:
            with contextlib.suppress(OSError):  # it has its name, or could not be made at all
                temporary.unlink()


def _entry_size(height: int, width: int) -> int:
    return HEADER + 4 * height * width


def _checksum(facts: bytes, *pixels: Tensor) -> int:
    checksum = zlib.crc32(facts)
    for part in pixels:
        checksum = zlib.crc32(part.numpy().data, checksum)
    return checksum


def _source(pair: Pair) -> list[int]:
    """Returns size and mtime_ns of both files; what a valid entry was made of."""
    try:
        image, mask = (path.stat() for path in pair)
    except OSError as error:
        what = "file not found" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(
            f"{what}: {error.filename}; restore it, as the cache needs the files it was made of"
        ) from error
    return [image.st_size, image.st_mtime_ns, mask.st_size, mask.st_mtime_ns]


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed writers have left, but nothing that may be in use."""
    with contextlib.suppress(OSError):  # no folder yet, or a read-only one
        for path in folder.glob("*.bin.*.tmp"):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                path.unlink()
