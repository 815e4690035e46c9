"""The decoded cache gives what decoding gives, whatever happens to its files, sources and disk."""

import errno
import gc
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails_naming, make_scene
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from isanet_pl.data import cache as cache_module
from isanet_pl.data.cache import HEADER, LEFTOVER_AGE, DecodedCache
from isanet_pl.data.files import read_image, read_mask

EXIF_SIDEWAYS = Image.Exif()
EXIF_SIDEWAYS[0x0112] = 6

IMAGES = {  # file name and what is saved there, of the size of a scene
    "colour.png": lambda image: image,
    "photo.jpg": lambda image: image,
    "grey.png": lambda image: image.convert("L"),
    "grey.jpg": lambda image: image.convert("L"),
    "palette.png": lambda image: image.quantize(16),
    "alpha.png": lambda image: image.convert("RGBA"),
    "sixteen.png": lambda image: Image.fromarray(np.array(image)[..., 0].astype(np.uint16) * 257),
}


@pytest.fixture
def cache(tmp_path):
    return DecodedCache(tmp_path / "cache", b"key")


def make_pair(
    folder, index=0, size=(17, 33), name="image.ppm", save=lambda image: image, **options
):
    """Writes an image and a mask of this size; returns their paths. Uncompressed by default."""
    folder.mkdir(exist_ok=True)
    image, mask = make_scene(index, size, [0, 1, 2, 255])
    pair = folder / f"{index}{name}", folder / f"{index}mask.bmp"
    save(Image.fromarray(image)).save(pair[0], **options)
    Image.fromarray(mask).save(pair[1])
    return pair


def decode(pair):
    return read_image(pair[0]), torch.from_numpy(read_mask(pair[1]))


def never():
    raise AssertionError("decoded again")


def equals(sample, pair):
    return all(map(torch.equal, sample, decode(pair)))


def files(cache, pattern="*/*.bin"):
    return sorted(cache.folder.glob(pattern))


def fresh(cache):
    """Returns the cache as another process sees it, which has checked nothing yet."""
    return DecodedCache(cache.folder, b"key")


def is_remade(cache, pair):
    """Reads a pair whose entry is not valid; returns whether it was decoded, and once only."""
    calls = []
    sample = cache.read(pair, lambda: calls.append(1) or decode(pair))
    assert equals(sample, pair)
    assert equals(fresh(cache).read(pair, never), pair)
    return len(calls) == 1


# What is read


@pytest.mark.parametrize("size", [(17, 33), (1, 1), (1, 40), (40, 1), (64, 64)], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_samples_are_the_decoded_files(tmp_path, cache, name, size):
    pair = make_pair(tmp_path / "data", size=size, name=name, save=IMAGES[name])
    first = cache.read(pair, lambda: decode(pair))
    for image, mask in (first, cache.read(pair, never), fresh(cache).read(pair, never)):
        assert equals((image, mask), pair)
        assert image.dtype == mask.dtype == torch.uint8
        assert image.shape == (3, *mask.shape) == (3, *size)
        assert image.permute(1, 2, 0).is_contiguous()
        assert mask.is_contiguous()
    assert [path.stat().st_size for path in files(cache)] == [HEADER + 4 * size[0] * size[1]]


def test_tensors_of_any_memory_layout(tmp_path, cache):
    pair = make_pair(tmp_path / "data")
    image, mask = decode(pair)
    cache.read(pair, lambda: (image.contiguous(), mask.T.contiguous().T))
    assert equals(cache.read(pair, never), pair)


def test_sideways_photo(tmp_path, cache):
    pair = make_pair(tmp_path / "data", name="photo.jpg", exif=EXIF_SIDEWAYS)
    Image.open(pair[1]).transpose(Image.Transpose.ROTATE_270).save(pair[1])
    assert is_remade(cache, pair)
    assert cache.read(pair, never)[0].shape == (3, 33, 17)


def test_every_pair_has_its_own_entry(tmp_path, cache):
    pairs = [make_pair(tmp_path / "data", index, (9, 5 + index % 3)) for index in range(20)]
    mixed = [(image, mask) for (image, _), (_, mask) in zip(pairs[3:], pairs, strict=False)]
    for pair in pairs + mixed:
        assert is_remade(cache, pair)
    assert all(equals(cache.read(pair, never), pair) for pair in pairs + mixed)
    assert len(files(cache)) == 37


def test_every_key_has_its_own_entries(tmp_path, cache):
    pair = make_pair(tmp_path / "data")
    image, mask = decode(pair)
    cache.read(pair, lambda: (image, mask))
    other = DecodedCache(cache.folder, b"another key")
    assert torch.equal(other.read(pair, lambda: (image, mask + 1))[1], mask + 1)
    assert torch.equal(other.read(pair, never)[1], mask + 1)
    assert torch.equal(cache.read(pair, never)[1], mask)


def test_files_are_the_same_by_whatever_path(tmp_path, cache, monkeypatch):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert equals(
        cache.read((Path("link") / pair[0].name, Path("data") / pair[1].name), never), pair
    )


def test_cache_in_a_relative_folder_stays_where_it_was_made(tmp_path, monkeypatch):
    pair = make_pair(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    cache = DecodedCache(Path("cache"), b"key")
    monkeypatch.chdir("data")
    assert is_remade(cache, pair)
    assert len(list((tmp_path / "cache").glob("*/*.bin"))) == 1


def test_writing_to_samples_changes_no_file(tmp_path, cache):
    pair = make_pair(tmp_path / "data")
    for get in (lambda: decode(pair), never, never):
        image, mask = cache.read(pair, get)
        assert equals((image, mask), pair)
        image.fill_(7)
        mask.fill_(7)
    assert equals(fresh(cache).read(pair, never), pair)


def test_reading_keeps_nothing_open(tmp_path, cache):
    pairs = [make_pair(tmp_path / "data", index) for index in range(3)]
    expected = [decode(pair) for pair in pairs]
    for pair in pairs:
        cache.read(pair, lambda pair=pair: decode(pair))

    def maps():
        return Path("/proc/self/maps").read_text().count(str(cache.folder))

    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()  # what earlier tests have left would close its own meanwhile
    before = descriptors()
    held = [cache.read(pair, never) for _ in range(50) for pair in pairs]
    assert maps() == 150
    assert descriptors() == before  # there are a thousand at most, and tens of thousands of maps
    # What is held stays as it is when the entry is made again, and when the cache is removed.
    for old, new in zip(pairs[0], pairs[1], strict=True):
        shutil.copy(new, old)
    assert is_remade(cache, pairs[0])
    shutil.rmtree(cache.folder)
    for index, sample in enumerate(held):
        assert all(map(torch.equal, sample, expected[index % 3]))
    del held, sample
    assert maps() == 0


# Sources that change


@pytest.mark.parametrize("part", [0, 1], ids=["image", "mask"])
@pytest.mark.parametrize("step", [1, -(10**9)], ids=["newer", "older"])
def test_source_with_another_time_is_decoded_again(tmp_path, cache, part, step):
    pair, other = (make_pair(tmp_path / name, index) for index, name in enumerate("ab"))
    assert is_remade(cache, pair)
    before = pair[part].stat()
    assert other[part].stat().st_size == before.st_size  # only the time tells
    pair[part].write_bytes(other[part].read_bytes())
    os.utime(pair[part], ns=(before.st_atime_ns, before.st_mtime_ns + step))
    assert is_remade(cache, pair)
    assert len(files(cache)) == 1


@pytest.mark.parametrize("part", [0, 1], ids=["image", "mask"])
def test_source_with_another_size_is_decoded_again(tmp_path, cache, part):
    pair = make_pair(tmp_path / "data")
    assert is_remade(cache, pair)
    before = pair[part].stat()
    pair[part].write_bytes(pair[part].read_bytes() + b"\0")
    os.utime(pair[part], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_remade(cache, pair)


def test_source_that_changes_while_it_is_decoded_is_decoded_again(tmp_path, cache):
    pair, other = make_pair(tmp_path / "a"), make_pair(tmp_path / "b", 1, size=(20, 20))

    def change():
        sample = decode(pair)
        for old, new in zip(pair, other, strict=True):
            shutil.copy(new, old)
        return sample

    cache.read(pair, change)
    assert is_remade(cache, pair)


@pytest.mark.parametrize("part", [0, 1], ids=["image", "mask"])
def test_source_that_is_gone_is_named(tmp_path, cache, part):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    pair[part].unlink()
    with fails_naming("file not found", pair[part], "restore"):
        cache.read(pair, never)


def test_source_that_cannot_be_decoded_leaves_nothing(tmp_path, cache):
    pair = make_pair(tmp_path / "data")
    content = pair[0].read_bytes()
    pair[0].write_bytes(content[:50])
    for _ in range(2):
        with fails_naming(pair[0], "restore"):
            cache.read(pair, lambda: decode(pair))
    assert files(cache, "**/*") == []
    pair[0].write_bytes(content)
    assert is_remade(cache, pair)


# Entries that are damaged


@pytest.mark.parametrize("size", [0, 1, 57, 61, HEADER - 1, HEADER, HEADER + 9, -1, +1])
def test_entry_of_wrong_size_is_made_again(tmp_path, cache, size):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    (path,) = files(cache)
    content = path.read_bytes()
    os.truncate(path, size if size not in (-1, 1) else len(content) + size)
    assert is_remade(fresh(cache), pair)
    assert path.read_bytes() == content


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 24, 32, 40, 48, 56, HEADER, HEADER + 999, -1])
@pytest.mark.parametrize("bit", [1, 128])
def test_entry_with_a_flipped_bit_is_made_again(tmp_path, cache, at, bit):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    (path,) = files(cache)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[at] ^= bit
    path.write_bytes(damaged)
    assert is_remade(fresh(cache), pair)
    assert path.read_bytes() == content


def test_entry_with_height_and_width_exchanged_is_made_again(tmp_path, cache):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    (path,) = files(cache)
    content = path.read_bytes()
    path.write_bytes(content[:8] + content[16:24] + content[8:16] + content[24:])
    assert is_remade(fresh(cache), pair)


def test_entry_of_another_version_is_made_again(tmp_path, cache, monkeypatch):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    monkeypatch.setattr(cache_module, "MAGIC", b"isanet\0\2")
    assert is_remade(cache, pair)
    assert len(files(cache)) == 1


def test_entry_that_shrinks_while_it_is_opened_is_made_again(tmp_path, cache, monkeypatch):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    from_file = torch.from_file

    def shrink(name, **options):
        monkeypatch.setattr(torch, "from_file", from_file)
        os.truncate(name, 100)
        return from_file(name, **options)

    monkeypatch.setattr(torch, "from_file", shrink)
    assert is_remade(cache, pair)


def test_damage_is_told_and_mere_change_is_not(tmp_path, cache, caplog):
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    (path,) = files(cache)
    os.utime(pair[0], (0, 0))
    assert is_remade(cache, pair)
    os.truncate(path, HEADER)
    assert is_remade(cache, pair)
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
    assert is_remade(cache, pair)
    (record,) = [record for record in caplog.records if record.levelname != "INFO"]
    assert record.levelname == "WARNING"
    assert "damaged" in record.getMessage()
    assert str(path) in record.getMessage()


def test_checksum_is_read_once_for_each_file(tmp_path, cache, monkeypatch):
    pair = make_pair(tmp_path / "data")
    read = []
    checksum = cache_module._checksum
    monkeypatch.setattr(cache_module, "_checksum", lambda *a: read.append(1) or checksum(*a))
    cache.read(pair, lambda: decode(pair))
    for count in (2, 2, 2):  # one to write, one at the first reading
        cache.read(pair, never)
        assert len(read) == count
    (path,) = files(cache)
    path.write_bytes(path.read_bytes())  # another file of the same name is checked
    later = path.stat().st_mtime_ns + 10**9  # older kernels count in hundredths of a second
    os.utime(path, ns=(later, later))
    cache.read(pair, never)
    assert len(read) == 3


# Several processes


def run_forked(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def read_with_others(folder, pairs, barrier, results):
    cache = DecodedCache(folder, b"key")

    def decode_with_others(pair):
        barrier.wait(timeout=20)  # nobody goes on to write until everybody found no entry
        return decode(pair)

    first = [cache.read(pair, lambda pair=pair: decode_with_others(pair)) for pair in pairs]
    again = [cache.read(pair, never) for pair in pairs]
    results.put([equals(s, p) for s, p in zip(first + again, pairs + pairs, strict=True)])


def test_processes_that_fill_a_cache_at_once(tmp_path, cache):
    pairs = [make_pair(tmp_path / "data", index, (50, 30 + index)) for index in range(8)]
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (cache.folder, pairs, barrier, results)
    processes = [run_forked(read_with_others, *arguments) for _ in range(4)]
    assert [results.get(timeout=20) for _ in processes] == [[True] * 16] * 4
    for process in processes:
        process.join()
    assert len(files(cache)) == 8
    assert files(cache, "*.tmp") == []
    assert all(equals(cache.read(pair, never), pair) for pair in pairs)


def write_and_hang(cache, pair, share):
    """Writes a share of an entry, and hangs where the rest would be brought to the disk."""

    def hang(descriptor):
        os.ftruncate(descriptor, int(os.fstat(descriptor).st_size * share))
        time.sleep(60)

    os.fsync = hang
    cache.read(pair, lambda: decode(pair))


@pytest.mark.parametrize("share", [0.5, 1])
def test_killed_writer_does_no_harm(tmp_path, cache, share):
    pair = make_pair(tmp_path / "data", size=(40, 50))
    writer = run_forked(write_and_hang, cache, pair, share)
    deadline = time.monotonic() + 20
    wanted = int(share * (HEADER + 4 * 40 * 50))
    while [path.stat().st_size for path in files(cache, "*.tmp")] != [wanted]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert files(cache) == []
    assert is_remade(cache, pair)
    # What it left is removed once nobody can be writing it any more.
    (leftover,) = files(cache, "*.tmp")
    recent = time.time() - LEFTOVER_AGE + 60
    os.utime(leftover, (recent, recent))
    fresh(cache)
    assert leftover.exists()
    old = time.time() - LEFTOVER_AGE - 1
    for path in cache.folder.rglob("*"):
        os.utime(path, (old, old))
    fresh(cache)
    assert not leftover.exists()
    assert equals(cache.read(pair, never), pair)


class Pairs(Dataset):
    """Cached pairs, in a form that a worker process can be given."""

    def __init__(self, cache, pairs):
        self.cache, self.pairs = cache, pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pair = self.pairs[index]
        return self.cache.read(pair, lambda: decode(pair))


def test_loader_workers(tmp_path, cache):
    pairs = [make_pair(tmp_path / "data", index) for index in range(4)]
    cache.read(pairs[0], lambda: decode(pairs[0]))
    loader = DataLoader(Pairs(cache, pairs), batch_size=2, num_workers=1)
    for _ in range(2):
        images, masks = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert all(map(equals, zip(images, masks, strict=True), pairs))
    assert all(equals(cache.read(pair, never), pair) for pair in pairs)


def test_pickled_cache_is_the_same(tmp_path, cache):  # as spawned workers get it
    pair = make_pair(tmp_path / "data")
    cache.read(pair, lambda: decode(pair))
    assert equals(pickle.loads(pickle.dumps(cache)).read(pair, never), pair)


# Disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_becomes_full_takes_no_more(tmp_path, cache, monkeypatch, code):
    pairs = [make_pair(tmp_path / "data", index, size=(500, 1000)) for index in range(2)]
    tried = []

    def fail(descriptor):
        assert os.fstat(descriptor).st_size == HEADER + 4 * 500 * 1000
        tried.append(descriptor)
        raise OSError(code, os.strerror(code))

    assert cache.failure is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for pair in pairs * 2:
            assert equals(cache.read(pair, lambda pair=pair: decode(pair)), pair)
    assert len(tried) == 1
    assert cache.failure == os.strerror(code)
    assert not [path for path in files(cache, "**/*") if path.is_file()]
    assert is_remade(fresh(cache), pairs[0])
    assert equals(cache.read(pairs[0], never), pairs[0])  # what is there is read


def test_all_processes_know_of_a_full_disk(tmp_path, cache, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pairs = [make_pair(tmp_path / "data", index) for index in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        loader = DataLoader(Pairs(cache, pairs), batch_size=2, num_workers=1)
        images, masks = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert all(map(equals, zip(images, masks, strict=True), pairs))
    assert cache.failure == "No space left on device"
    cache.read(pairs[0], lambda: decode(pairs[0]))
    assert files(cache) == []


def test_write_that_stops_half_way_leaves_nothing(tmp_path, cache):
    pair = make_pair(tmp_path / "data", size=(300, 300))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes, of 360 thousand
    try:
        assert equals(cache.read(pair, lambda: decode(pair)), pair)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.failure == "File too large"
    assert not [path for path in files(cache, "**/*") if path.is_file()]
    assert is_remade(fresh(cache), pair)


def test_folder_that_cannot_be_made(tmp_path):
    pair = make_pair(tmp_path / "data")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        cache = DecodedCache(folder, b"key")
        with fails_naming("cannot write to --data.cache", folder, "name a folder"):
            cache.check_space([pair])
        assert equals(cache.read(pair, lambda: decode(pair)), pair)
        assert cache.failure is not None


def test_read_only_cache_serves_if_it_is_complete(tmp_path, cache, monkeypatch):
    pairs = [make_pair(tmp_path / "data", index) for index in range(2)]
    cache.read(pairs[0], lambda: decode(pairs[0]))

    def fail(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # The tests may run as root, whom no mode of a folder stops.
    monkeypatch.setattr(cache_module.tempfile, "TemporaryFile", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    leftover = cache.folder / "0.bin.0.tmp"
    leftover.touch()
    os.utime(leftover, (0, 0))
    cache = fresh(cache)
    cache.check_space(pairs[:1])
    assert equals(cache.read(pairs[0], never), pairs[0])
    with fails_naming("cannot write to", cache.folder, "Read-only"):
        cache.check_space(pairs)


def test_space_is_checked_for_what_is_not_cached(tmp_path, cache, monkeypatch):
    pairs = [make_pair(tmp_path / "data", index, (100, 100 * (index + 1))) for index in range(4)]
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: disk)
    # 4 bytes a pixel and a page each, a twentieth more, and 268 MB to spare.
    for cached, needed in enumerate([437_203, 390_902, 302_601, 172_300]):
        disk.free = needed + 2**28 + 2
        cache.check_space(pairs)
        disk.free = needed + 2**28 - 2
        with fails_naming(f"{cache.folder} needs {needed / 1e6:.1f} MB", "268.4 MB to", "268."):
            cache.check_space(pairs)
        cache.read(pairs[cached], lambda cached=cached: decode(pairs[cached]))
    disk.free = 0
    cache.check_space(pairs)
    cache.check_space([])


def test_space_of_many_images_is_estimated_from_some(tmp_path, cache, monkeypatch):
    image = tmp_path / "large.png"
    Image.new("1", (9000, 9000)).save(image)
    read = []
    size = cache_module.displayed_size
    monkeypatch.setattr(cache_module, "displayed_size", lambda p: read.append(p) or size(p))
    # 1.05 * 10 million * 324 MB, more than any disk has
    with fails_naming(cache.folder, "needs 3402043", "GB"):
        cache.check_space([(image, image)] * 10_000_000)
    assert len(read) == 500
