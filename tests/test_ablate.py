"""The ablation runner, with real runs of a few steps."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_cli import TINY
from test_devices import is_running
from test_readme import COMMANDS, ROOT
from wandb_file import RunFile

from isanet_pl.errors import InputError

SCRIPT = ROOT / "scripts" / "ablate.py"
OVERLAYS = ROOT / "configs" / "ablation"
NONE = OVERLAYS / "context_none.yaml"
QUICK = ("--", "--panels.num_images", "0")


@pytest.fixture(autouse=True)
def clean_process(monkeypatch, scripts_on_path):
    monkeypatch.setattr(sys, "argv", ["ablate.py"])
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def write_base(folder, **trainer):
    """Writes a config that trains in seconds, and one that fails once the data is read."""
    config = yaml.safe_load(TINY)
    config["trainer"] |= {"enable_progress_bar": True, **trainer}
    config["last_checkpoint"] = {"every_n_steps": 5}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    (folder / "hungry.yaml").write_text("data: {init_args: {batch_size: 9}}")
    (folder / "offline.yaml").write_text("wandb: offline")
    return folder


def start(folder, *args):
    command = [sys.executable, str(SCRIPT), "--config", "tiny.yaml", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    hear = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the suite may run under nohup
    return subprocess.Popen(command, cwd=folder, preexec_fn=hear, **pipes)


def ablate(folder, *args):
    """Returns exit code and output."""
    process = start(folder, *args)
    try:
        out = process.communicate(timeout=800)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # with its runs
        process.communicate()
        raise
    return process.returncode, out


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Returns a folder where a grid of three settings and two seeds ran, and what it printed."""
    folder = write_base(tmp_path_factory.mktemp("grid"))
    overlays = ("--overlays", f"{NONE}+offline.yaml", "hungry.yaml")
    code, out = ablate(folder, *overlays, "--seeds", 0, 1, "--jobs", 2, *QUICK)
    return folder, code, out


SETTINGS = {"base": "isa", "context_none+offline": "none"}
"""Those of the grid that end, with their context."""


def result(folder, cell, version=0):
    run = folder / "runs" / "ablation_tiny" / cell / f"version_{version}"
    return json.loads((run / "results.json").read_text())


@pytest.mark.slow
def test_each_cell_is_a_run_with_its_overlay_and_seed(grid):
    folder, _, _ = grid
    for setting, context in SETTINGS.items():
        for seed in (0, 1):
            cell = folder / "runs" / "ablation_tiny" / setting / f"seed{seed}"
            assert result(folder, f"{setting}/seed{seed}")["step"] == 4
            config = yaml.safe_load((cell / "version_0" / "config.yaml").read_text())
            assert config["model"]["network"]["context"] == context
            assert config["seed_everything"] == seed
            assert config["panels"]["num_images"] == 0  # behind --
            assert f"Seed set to {seed}" in cell.with_suffix(".log").read_text()


def test_a_failing_cell_stops_nothing_and_is_reported_with_its_log(grid):
    _, code, out = grid
    assert code == 1
    for seed in (0, 1):
        reason = out.split(f"hungry/seed{seed} has not finished: exit code 2")[1]
        assert "8 images, fewer than one batch of 9" in reason
    assert out.count("has not finished") == 2


def test_the_table_has_mean_and_spread(grid):
    folder, _, out = grid
    means = {}
    for setting in SETTINGS:
        a, b = (100 * result(folder, f"{setting}/seed{i}")["scores"]["miou"] for i in (0, 1))
        means[setting] = (a + b) / 2
        row = next(line for line in out.splitlines() if line.startswith(f"│ {setting} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        spread = abs(a - b) / 2**0.5  # of a sample of two
        assert cells[1:4] == ["2", f"{means[setting]:.2f}", f"{spread:.2f}"]
        assert cells[5] == f"{a:.2f} {b:.2f}"
    assert cells[4] == f"{means['context_none+offline'] - means['base']:+.2f}"
    assert "report.py runs/ablation_tiny" in out


def test_wandb_groups_the_grid_and_tags_the_cells(grid):
    folder, _, _ = grid
    for seed in (0, 1):
        cell = folder / "runs" / "ablation_tiny" / "context_none+offline" / f"seed{seed}"
        [path] = cell.glob("version_0/**/*.wandb")
        run = RunFile(path).run
        assert run.run_group == "ablation_tiny"
        assert set(run.tags) == {"context_none", "offline", f"seed{seed}"}
    assert not list(folder.glob("runs/*/base/**/*.wandb"))


def in_process(folder, monkeypatch, *args):
    from ablate import main

    monkeypatch.chdir(folder)
    return main(["--config", "tiny.yaml", *map(str, args)])


def test_a_second_start_runs_nothing_again(grid, monkeypatch, capsys):
    folder, _, _ = grid
    overlays = ("--overlays", f"{NONE}+offline.yaml")
    assert in_process(folder, monkeypatch, *overlays, "--seeds", 0, 1, *QUICK) == 0
    out = capsys.readouterr().out
    assert out.count("has finished") == 4
    assert "starts" not in out
    assert not list(folder.glob("runs/*/*/*/version_1"))


def test_cells_of_another_commit_are_named(grid, monkeypatch, capsys):
    import ablate

    folder, _, _ = grid
    path = folder / "runs" / "ablation_tiny" / "base" / "seed1" / "version_0" / "results.json"
    written = path.read_text()
    git = json.loads(written)["git"]
    monkeypatch.setattr(ablate, "code_version", lambda: git)
    try:
        path.write_text(json.dumps({**json.loads(written), "git": "0" * 40}))
        assert in_process(folder, monkeypatch, "--seeds", 0, 1, *QUICK) == 0
    finally:
        path.write_text(written)
    assert "of another commit than the code has now: base/seed1. " in capsys.readouterr().out
    assert in_process(folder, monkeypatch, "--seeds", 0, 1, *QUICK) == 0
    assert "another commit" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["trainer.max_steps", "data.init_args.num_eval"])
def test_another_config_is_refused_and_not_taken_for_finished(grid, monkeypatch, option):
    from isanet_pl.errors import InputError

    folder, _, _ = grid
    with pytest.raises(InputError, match=r"\n  \w+\.(max_steps|num_eval): then 4, now 8") as error:
        in_process(folder, monkeypatch, "--seeds", 0, *QUICK, f"--{option}", "8")
    assert "base/seed0/version_0 was run with another config" in str(error.value)
    assert "delete runs/ablation_tiny/base/seed0 to run it anew" in str(error.value)


def test_an_option_newer_than_the_run_had_its_default(grid, monkeypatch, capsys):
    from isanet_pl.errors import InputError

    folder, _, _ = grid
    path = folder / "runs" / "ablation_tiny" / "base" / "seed1" / "version_0" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["model"].pop("poly_power") == 0.9
    path.write_text(yaml.safe_dump(config))
    assert in_process(folder, monkeypatch, "--seeds", 1, "--dry-run", *QUICK) == 0
    assert "has finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"poly_power: then 0\.9, now 1\.0"):
        in_process(folder, monkeypatch, "--seeds", 1, *QUICK, "--model.poly_power", "1.0")


def test_where_and_how_it_runs_does_not_make_another_config(grid, monkeypatch, capsys):
    folder, _, _ = grid
    options = ("--data.num_workers", "1", "--trainer.enable_progress_bar", "false")
    assert in_process(folder, monkeypatch, "--seeds", 0, "--dry-run", *QUICK, *options) == 0
    assert "has finished" in capsys.readouterr().out


def test_a_test_of_a_run_is_not_taken_for_a_fit(grid, monkeypatch, capsys):
    # `isanet-pl test --config RUN/config.yaml` puts its result beside the fit's.
    folder, _, _ = grid
    other = folder / "runs" / "ablation_tiny" / "base" / "seed0" / "version_7"
    other.mkdir()
    record = {**result(folder, "base/seed0"), "command": "isanet-pl test --config x"}
    (other / "results.json").write_text(json.dumps(record))
    assert in_process(folder, monkeypatch, "--seeds", 0, "--dry-run", *QUICK) == 0
    assert "has finished" in capsys.readouterr().out
    fit = folder / "runs" / "ablation_tiny" / "base" / "seed0" / "version_0"
    fit.rename(fit.with_name("away"))
    try:
        in_process(folder, monkeypatch, "--seeds", 0, "--dry-run", *QUICK)
        assert "has finished" not in capsys.readouterr().out
    finally:
        fit.with_name("away").rename(fit)


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path, monkeypatch, capsys):
    write_base(tmp_path)
    both = f"{NONE}+{OVERLAYS / 'ohem.yaml'}"
    options = ("--overlays", both, "--seeds", 5, "--no-base", "--output", "out/my grid")
    assert in_process(tmp_path, monkeypatch, *options, "--dry-run", "--", "--data.seed", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    files = ["tiny.yaml", str(NONE), str(OVERLAYS / "ohem.yaml")]
    assert [shlex.split(line) for line in lines] == [
        [
            *("WANDB_RUN_GROUP=my grid", "WANDB_TAGS=context_none,ohem,seed5"),
            *(sys.executable, "-m", "isanet_pl", "fit"),
            *(part for file in files for part in ("--config", file)),
            *("--data.seed", "3", "--seed_everything", "5"),
            *("--runs_dir", "out/my grid", "--name", "context_none+ohem/seed5"),
        ]
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--overlays", "nowhere.yaml"), "no such config: nowhere.yaml"),
        (("--overlays", NONE, NONE), "two settings are named context_none"),
        (("--no-base",), "nothing to run: give --overlays"),
        (("--overlays", "typo.yaml"), "typo/seed0 has no valid config: .*init_arg"),
    ],
)
def test_wrong_input_is_refused_before_the_first_run(tmp_path, monkeypatch, args, message):
    from isanet_pl.errors import InputError

    write_base(tmp_path)
    (tmp_path / "typo.yaml").write_text("data: {init_arg: {batch_size: 1}}")
    with pytest.raises(InputError, match=rf"(?s){message}"):
        in_process(tmp_path, monkeypatch, *args)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--jobs", 0), "--jobs must be at least 1"),
        (("--", "--name=x"), "--name is set for each run"),
        (("--", "--seed_everything", 1), "--seed_everything is set for each run"),
    ],
)
def test_wrong_options_are_refused(tmp_path, monkeypatch, capsys, args, message):
    write_base(tmp_path)
    with pytest.raises(SystemExit) as stop:
        in_process(tmp_path, monkeypatch, *args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def wait_for(condition, seconds=400):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_locked(path):
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.slow
def test_a_stopped_grid_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    write_base(tmp_path, max_steps=100, val_check_interval=50, log_every_n_steps=1)
    cell = tmp_path / "runs" / "ablation_tiny" / "base" / "seed0"
    log, run = cell.with_suffix(".log"), cell / "version_0"
    last = run / "checkpoints" / "last.ckpt"

    # The run is killed, and the grid goes on to its end.
    first = start(tmp_path, "--seeds", 0)
    wait_for(last.is_file)
    assert is_locked(log)
    [child] = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    assert "has not finished: exit code -9" in first.communicate(timeout=60)[0]
    assert first.returncode == 1
    killed_at = torch.load(last, weights_only=True)["global_step"]

    # What ends the grid ends the run.
    written = last.stat().st_mtime_ns
    second = start(tmp_path, "--seeds", 0)
    wait_for(lambda: last.stat().st_mtime_ns > written)
    second.send_signal(signal.SIGTERM)
    assert "the same command goes on" in second.communicate(timeout=60)[0]
    assert second.returncode == 130
    assert not is_locked(log)  # nothing of it lives on
    assert not (run / "results.json").exists()
    stopped_at = torch.load(last, weights_only=True)["global_step"]
    assert 0 < killed_at < stopped_at < 100

    assert in_process(tmp_path, monkeypatch, "--seeds", 0) == 0
    out = capsys.readouterr().out
    assert f"base/seed0: resumes from {last.relative_to(tmp_path)}" in out
    assert [path.name for path in cell.iterdir()] == ["version_0"]
    assert result(tmp_path, "base/seed0")["step"] == 100
    third = log.read_text().rpartition("Restored all states")[2]
    steps = [int(step) for step in re.findall(r"^step (\d+)/100 ", third, re.M)]
    assert steps == list(range(10 * (stopped_at // 10 + 1), 101, 10))


def test_a_cell_that_another_process_runs_is_left_alone(tmp_path, monkeypatch, capsys):
    write_base(tmp_path)
    log = tmp_path / "runs" / "ablation_tiny" / "base" / "seed0.log"
    log.parent.mkdir(parents=True)
    with log.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert in_process(tmp_path, monkeypatch, "--seeds", 0) == 1
    assert "base/seed0 has not finished: another process runs it" in capsys.readouterr().out
    assert [path.name for path in log.parent.iterdir()] == ["seed0.log"]


def test_several_runs_share_the_machine(monkeypatch):
    from ablate import share_of_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    trainer = {"accelerator": "auto", "devices": "auto"}
    assert share_of_machine(1, 4, trainer) == {"OMP_NUM_THREADS": "2"}
    assert share_of_machine(0, 1, trainer) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = [share_of_machine(slot, 3, trainer)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert devices == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    share = {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "4"}
    assert share_of_machine(1, 2, trainer) == share
    # One run at a time trains on one GPU as well: a batch stays what the config says.
    assert share_of_machine(0, 1, trainer) == {"CUDA_VISIBLE_DEVICES": "3"}
    # Beside GPUs, runs on the CPU share its cores.
    on_cpu = {**trainer, "accelerator": "cpu"}
    assert share_of_machine(1, 4, on_cpu) == {"OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    ("devices", "jobs", "expected"),
    [
        (2, 2, ["0,1", "2,3"]),
        ("2", 3, ["0,1", "2,3", "0,1"]),
        (3, 2, ["0,1,2"] * 2),
        (8, 1, ["0,1,2,3,4"]),  # Lightning will tell
        ([1, 2], 2, [None] * 2),
        ("1,2", 2, [None] * 2),
        (-1, 1, [None]),
    ],
)
def test_runs_on_several_gpus_get_different_ones(monkeypatch, devices, jobs, expected):
    from ablate import share_of_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    trainer = {"accelerator": "gpu", "devices": devices}
    shares = [share_of_machine(slot, jobs, trainer) for slot in range(jobs)]
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in shares] == expected


class Recorder:
    """A process of a cell that ends at the third look, and what it was started with."""

    started: list = []

    def __init__(self, cell, config, environment):
        self.cell, self.looks = cell, 0
        self.found = self.process = SimpleNamespace(finished=False, checkpoint=None)
        self.started.append((cell.seed, environment))

    def exit_code(self):
        self.looks += 1
        return 1 if self.looks > 2 + self.cell.seed else None  # those of later seeds take longer

    def progress(self):
        return 0.0, 0.0

    def last_lines(self):
        return []


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("auto", ["0", "1", "0", "1"]), (1, ["0", "1", "0", "1"]), (2, ["0,1"] * 4)],
)
def test_each_run_gets_the_gpu_of_its_slot(tmp_path, monkeypatch, devices, expected):
    import ablate
    from ablation.cells import Cell

    monkeypatch.setattr(ablate, "Attempt", Recorder)
    monkeypatch.setattr(ablate, "stop", list)
    monkeypatch.setattr(ablate, "POLL_SECONDS", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Recorder, "started", [])
    config = {"trainer": {"accelerator": "auto", "devices": devices}}
    cells = {Cell("base", seed, tmp_path, ()): config for seed in range(4)}
    grid = ablate.Grid(cells, 2, lambda line: None)
    grid.run(lambda text, share: None)
    assert [seed for seed, _ in Recorder.started] == [0, 1, 2, 3]
    assert [share.get("CUDA_VISIBLE_DEVICES") for _, share in Recorder.started] == expected
    assert len(grid.failures) == 4  # none left a result


def test_a_cell_that_is_edited_while_the_grid_runs_stops_no_other(tmp_path, monkeypatch, capsys):
    import ablate
    from ablation.cells import Cell, Found

    def find(cell, config):
        if Recorder.started and cell.seed == 1:
            raise InputError("version_0 was run with another config than base/seed1 has now")
        return Found(finished=len(Recorder.started) == 3, miou=0.5)

    monkeypatch.setattr(ablate, "Attempt", Recorder)
    monkeypatch.setattr(ablate, "stop", list)
    monkeypatch.setattr(ablate, "POLL_SECONDS", 0)
    monkeypatch.setattr(Recorder, "started", [])
    monkeypatch.setattr(Recorder, "exit_code", lambda self: 0)
    monkeypatch.setattr(Cell, "resolve", lambda self: {"trainer": {"accelerator": "cpu"}})
    monkeypatch.setattr(Cell, "find", find)
    (tmp_path / "base.yaml").touch()
    arguments = ["--config", str(tmp_path / "base.yaml"), "--output", str(tmp_path / "runs")]
    assert ablate.main([*arguments, "--jobs", "3"]) == 1
    out = capsys.readouterr().out
    assert "base/seed1 has not finished: version_0 was run with another config" in out
    assert re.search(r"│ base +│ +2 │ 50.00 │", out)


# Stands in for isanet-pl: tells its process and environment, and ends only when it is killed.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
loader = os.fork()
if loader == 0:
    time.sleep(60)
print(loader, os.environ["OMP_NUM_THREADS"], os.environ["WANDB_TAGS"], flush=True)
time.sleep(60)
"""


def test_a_process_has_its_share_and_all_of_it_is_killed_in_the_end(tmp_path, monkeypatch):
    from ablation.cells import Attempt, Cell, stop

    command = [sys.executable, "-c", STUBBORN]
    monkeypatch.setattr(Cell, "command", lambda self, resume: command)
    cell = Cell("base", 3, tmp_path, ())
    attempt = Attempt(cell, {}, {"OMP_NUM_THREADS": "7"})
    wait_for(lambda: cell.log.read_text().count("\n") == 1)
    loader, *said = cell.log.read_text().split()
    assert said == ["7", "base,seed3"]
    assert is_locked(cell.log)
    stop([attempt], seconds=0.5)
    assert attempt.exit_code() == -signal.SIGKILL
    wait_for(lambda: not is_locked(cell.log), 10)  # the other process held it too
    wait_for(lambda: not is_running(loader), 10)


@pytest.fixture
def signals():
    """Restores what this process does when it is told to end."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_grid_is_told_to_end_as_by_ctrl_c(number, before):
    from ablate import end_as_on_ctrl_c

    signal.signal(number, before)
    end_as_on_ctrl_c()
    if number == signal.SIGHUP and before == signal.SIG_IGN:
        os.kill(os.getpid(), number)  # under nohup
    else:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_run_without_a_score_has_finished(tmp_path, monkeypatch, capsys):
    """As where nothing in the validation images is labelled."""
    from ablation.cells import Cell, Found

    folder = tmp_path / "base" / "seed0" / "version_0"
    folder.mkdir(parents=True)
    record = {"command": "isanet-pl fit --config a", "scores": {"miou": None}}
    (folder / "results.json").write_text(json.dumps(record))
    monkeypatch.setattr(Cell, "_check_same", lambda *args: None)
    found = Cell("base", 0, tmp_path, ()).find({})
    assert found == Found(finished=True)
    assert str(found) == "no val mIoU"


def test_finished_cells_are_no_work_left(tmp_path, monkeypatch):
    import ablate
    from ablation.cells import Cell, Found

    monkeypatch.setattr(ablate, "Attempt", Recorder)
    monkeypatch.setattr(ablate, "stop", list)
    monkeypatch.setattr(ablate, "POLL_SECONDS", 0)
    monkeypatch.setattr(Recorder, "started", [])
    monkeypatch.setattr(Cell, "find", lambda self, _: Found(finished=self.seed != 3, miou=0.5))
    cells = {Cell("base", seed, tmp_path, ()): {"trainer": {"devices": 1}} for seed in range(4)}
    said, shown = [], []
    grid = ablate.Grid(cells, 1, said.append)
    grid.run(lambda text, share: shown.append((text.split(";")[0], share)))
    assert [seed for seed, _ in Recorder.started] == [3]
    assert sum("has finished, 50.00% val mIoU" in line for line in said) == 3
    assert shown[0] == ("3 of 4 ended", 0.75)


def test_the_time_left_follows_from_the_steps_done(tmp_path):
    from ablate import Grid
    from ablation.cells import Attempt, Cell, Found

    # One waits, one has done half, a resumed one went from 20 to 40 of 100 steps.
    cells = [Cell("base", seed, tmp_path, ()) for seed in range(3)]
    grid = Grid({cell: {} for cell in cells}, 2, print)
    grid.waiting.append(cells[2])
    logs = "step 10/100  loss\nstep 50/100  loss\n", "step 20/100  loss\nstep 40/100  loss\n"
    for cell, log, checkpoint in zip(cells, logs, (None, Path("last.ckpt")), strict=False):
        cell.log.parent.mkdir(exist_ok=True)
        cell.log.write_text("step 99/100  of an earlier start\n" + log)
        attempt = SimpleNamespace(cell=cell, found=Found(checkpoint=checkpoint), first=None)
        attempt.begin = len("step 99/100  of an earlier start\n")
        attempt.progress = lambda attempt=attempt: Attempt.progress(attempt)
        grid.running[cell.seed] = attempt
    grid.start = time.monotonic() - 70
    text, share = grid.status()
    # 0.7 runs in 70 s; 1 + 0.5 + 0.6 are left: 210 s.
    assert text == "0 of 3 ended; base/seed0 50%, base/seed1 40%; 3.5 min left"
    assert share == pytest.approx(0.3)


GRIDS = [command[2:] for command in COMMANDS if command[1:2] == ["scripts/ablate.py"]]


@pytest.mark.parametrize("command", GRIDS)
def test_grids_of_the_readme_are_what_they_say(command, monkeypatch, capsys, tmp_path):
    from ablate import main

    monkeypatch.chdir(ROOT)
    assert main(["--dry-run", "--output", str(tmp_path), *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = [re.search(r"--name (\S+)/seed(\d)", line).groups() for line in lines]
    named = " ".join(command).split(" -- ")[0]
    settings = ["base", *re.findall(r"configs/ablation/(\w+)\.yaml", named)]
    seeds = re.search(r"--seeds ([\d ]+)", named)[1].split()
    assert runs == [(setting, seed) for seed in seeds for setting in settings]


def test_the_readme_has_a_grid():
    assert GRIDS
