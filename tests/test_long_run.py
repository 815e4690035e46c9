"""The script that measures whether long runs grow: it sees what grows, and nothing in ours does."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "scripts" / "long_run.py"
STEPS = 40

# What a run looks like from outside: it counts its steps, and has a loader process.
RUN = f"""
import os, time
kept = []
end, ours = os.pipe()
if os.fork() == 0:
    os.close(ours)
    os.read(end, 1)  # until the other process ends
    os._exit(0)
for step in range(1, {STEPS} + 1):
    LEAK
    print(f"step {{step}}/{STEPS}  loss 0.1", flush=True)
    time.sleep(0.05)
"""


def grow(scripts_on_path, leak):
    """Returns by how much each value grows over the second half of a run with a leak."""
    from long_run import growth, second_half, watch

    process = subprocess.Popen(
        [sys.executable, "-c", RUN.replace("LEAK", leak)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    half = second_half(watch(process, 0.02), STEPS)
    assert len(half) > 10
    assert {reading.num_workers for reading in half} == {1}
    return {
        name: growth(half, name)
        for name in ("main_mib", "workers_mib", "main_files", "workers_files")
    }


def test_a_run_that_keeps_nothing_does_not_grow(scripts_on_path):
    grown = grow(scripts_on_path, "bytearray(2**20)")
    assert all(abs(by) < 0.5 for by in grown.values()), grown


def test_memory_that_is_kept_is_seen(scripts_on_path):
    grown = grow(scripts_on_path, "kept.append(b'x' * 2**20)")
    assert grown["main_mib"] == pytest.approx(STEPS / 2, rel=0.15)
    assert abs(grown["main_files"]) < 0.5


def test_files_that_stay_open_are_seen(scripts_on_path):
    grown = grow(scripts_on_path, "kept.append(open(os.devnull))")
    assert grown["main_files"] == pytest.approx(STEPS / 2, rel=0.15)
    assert abs(grown["main_mib"]) < 0.5


def test_a_run_that_fails_is_no_measurement(scripts_on_path):
    with pytest.raises(SystemExit, match=r"the run failed:[\s\S]*ZeroDivisionError"):
        grow(scripts_on_path, "1 / 0")


@pytest.mark.slow
def test_a_short_run_of_ours_stays_flat(tmp_path):
    # A batch that is kept has 0.2 MiB, and 16 MiB are allowed.
    options = ["--steps", "200", "--validations", "4", "--workers", "1", "--interval", "0.1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "readings of the last 100 steps of 200" in done.stdout
    assert (tmp_path / "samples.csv").read_text().count("\n") > 20
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > 500
