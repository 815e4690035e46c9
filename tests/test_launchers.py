"""Runs that torchrun or SLURM starts, with processes on this machine in the place of a cluster."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import pytest
import torch
from test_ablate import wait_for
from test_cli import TINY
from test_readme import COMMANDS, ROOT, TEXT

from isanet_pl.cli import main

[SLURM_SCRIPT] = [
    block.replace("\\\n", " ").splitlines()
    for block in re.findall(r"```\n(#!/bin/bash\n.*?)```", TEXT, re.S)
]
SRUN = [shlex.split(line) for line in SLURM_SCRIPT if line.startswith("srun")]
TORCHRUN = [command for command in COMMANDS if command[0] == "torchrun"]
CPU = ("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def check_run(tmp_path, stderr):
    """Both processes took the same steps, and one of them wrote one run."""
    [folder] = (tmp_path / "runs" / "tiny").iterdir()
    assert json.loads((folder / "results.json").read_text())["step"] == 4
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert "distributed_backend=gloo" in stderr
    assert stderr.count("MEMBER: 2/2") == 1


def test_torchrun_starts_two_processes(tiny, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
    fit = ("-m", "isanet_pl", "fit", "--config", tiny, *CPU, "--trainer.devices", 2)
    command = [sys.executable, *map(str, (*launcher, *fit))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    check_run(tmp_path, done.stderr)


def slurm_task(rank, nodes, per_node, port):
    """Returns the environment that srun gives a task."""
    numbers = {"PROCID": rank, "NODEID": rank // per_node, "LOCALID": rank % per_node}
    numbers |= {"NTASKS": nodes * per_node, "NTASKS_PER_NODE": per_node, "NNODES": nodes}
    slurm = {f"SLURM_{name}": str(number) for name, number in numbers.items()}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "isanet", "SLURM_NODELIST": "localhost"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **slurm, **job, **address}


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 2), (2, 1)])
def test_slurm_starts_two_processes(tiny, tmp_path, nodes, per_node):
    devices = ("--trainer.devices", per_node, "--trainer.num_nodes", nodes)
    command = [sys.executable, "-m", "isanet_pl", "fit", "--config", tiny, *CPU, *devices]
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    tasks = [
        subprocess.Popen(
            [str(part) for part in command], env=slurm_task(rank, nodes, per_node, port), **pipes
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=180) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    check_run(tmp_path, "".join(stderr for _, stderr in outputs))


def value_of(arguments, option):
    """Returns the value of an option, written `--name value` or `--name=value`."""
    for part, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = part.partition("=")
        if name == option:
            return value or following
    return None


@pytest.mark.parametrize("command", [*TORCHRUN, *SRUN], ids=lambda c: " ".join(c[:4]))
def test_launched_commands_of_the_readme_parse(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    with pytest.raises(SystemExit) as stop:
        main([*command[command.index("fit") :], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_processes_of_the_readme_are_as_many_as_lightning_is_told():
    assert len(TORCHRUN) == 2  # one machine, and several
    for command in TORCHRUN:
        processes = value_of(command, "--nproc_per_node")
        assert processes == value_of(command, "--trainer.devices")
        assert value_of(command, "--nnodes") == value_of(command, "--trainer.num_nodes")
    [run] = SRUN
    lines = [line.split()[1:] for line in SLURM_SCRIPT if line.startswith("#SBATCH")]
    job = [option for options in lines for option in options]
    assert value_of(job, "--ntasks-per-node") == value_of(run, "--trainer.devices")
    assert value_of(job, "--nodes") == value_of(run, "--trainer.num_nodes")


def test_slurm_queues_a_job_again_and_it_goes_on(tiny, tmp_path):
    """What `--signal=SIGUSR1` and `default_root_dir` are for."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$*" > "{tmp_path}/requeued"\n')
    (tools / "scontrol").chmod(0o755)
    environment = slurm_task(0, 1, 1, free_port())
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    # Steps without end, so that the signal finds it training; the second start has a few.
    options = ("--resume", "true", "--trainer.default_root_dir", "job")
    options += ("--trainer.val_check_interval", "4")
    command = [sys.executable, "-m", "isanet_pl", "fit", "--config", str(tiny), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    endless = [*command, "--trainer.max_steps", "100000"]
    with subprocess.Popen(endless, env=environment, cwd=tmp_path, **pipes) as job:
        wait_for((tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt").is_file)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, output[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    run = tmp_path / "runs/tiny/version_0"
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert saved >= 4
    assert f"SLURM's signal: stopped after step {saved}" in output

    last = str(saved + 4)
    again = [*command, "--trainer.max_steps", last]
    done = subprocess.run(again, env=environment, cwd=tmp_path, timeout=180, **pipes)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"resuming from {run.relative_to(tmp_path)}/checkpoints/last.ckpt" in done.stdout
    ended = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert ended["global_step"] == saved + 4
    assert (run / "results.json").is_file()
    assert not run.with_name("version_1").exists()
