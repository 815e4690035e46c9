"""The W&B sweeps: every command line that an agent would start parses and takes a step."""

import itertools
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_camvid
from test_ablations import leaves, resolve

from isanet_pl.cli import main

ROOT = Path(__file__).parent.parent
SWEEPS = ROOT / "configs" / "sweeps"
BASE = "configs/camvid_isanet_r18-d8.yaml"
SMALL = (
    *("--wandb=off", "--model.network.pretrained=false", "--trainer.fast_dev_run=1"),
    *("--data.batch_size=2", "--data.num_workers=0"),
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
)


GRID = yaml.safe_load((SWEEPS / "ablation_grid.yaml").read_text())
BAYES = yaml.safe_load((SWEEPS / "bayes.yaml").read_text())
SETTINGS = GRID["parameters"]["config"]["values"]


def choices(parameter):
    """Returns all values of a parameter, or the ends of its range."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def combinations(sweep):
    parameters = sweep["parameters"]
    return [
        dict(zip(parameters, values, strict=True))
        for values in itertools.product(*map(choices, parameters.values()))
    ]


@pytest.fixture
def as_agent(tmp_path, monkeypatch):
    """Returns a function: the arguments of `isanet_pl` that W&B's agent starts a run with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["isanet-pl"])
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets these
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    from wandb import wandb_agent

    started = []

    class Started:
        def __init__(self, command, **kwargs):
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Started)

    def arguments(sweep, values):
        agent = wandb_agent.Agent(api=None, queue=None)
        agent._sweep_command = list(sweep["command"])
        args = {key: {"value": value} for key, value in values.items()}
        agent._command_run({"run_id": "abc", "program": sweep["program"], "args": args})
        launcher, given = started[-1][:4], started[-1][4:]
        assert launcher == ["/usr/bin/env", "python", "-m", "isanet_pl"]
        return given

    return arguments


@pytest.mark.parametrize("overlay", SETTINGS)
def test_runs_of_the_grid_are_the_overlay_over_the_base(overlay, as_agent):
    base = {**resolve("fit", "--config", BASE), ".data.init_args.root": "data/camvid"}
    base |= {".model.network.pretrained": True, ".wandb": "online"}
    named = leaves(yaml.safe_load((ROOT / overlay).read_text())) if overlay != BASE else {}
    seeds = []
    for values in combinations(GRID):
        if values["config"] == overlay:
            config = resolve(*as_agent(GRID, values))
            seeds.append(config[".seed_everything"])
            assert config == {**base, **named, ".seed_everything": seeds[-1]}
    assert seeds == [0, 1, 2]


def test_the_grid_names_every_overlay_that_changes_its_base():
    overlays = {f"configs/ablation/{path.name}" for path in (SWEEPS / "../ablation").iterdir()}
    named = set(SETTINGS)
    # CamVid's base is direct, has windows of 8 and an auxiliary head.
    same = {f"configs/ablation/{name}.yaml" for name in ("form_direct", "window_8", "aux_on")}
    assert named == overlays - same | {BASE}


@pytest.mark.parametrize("overlay", SETTINGS)
def test_run_of_the_grid_takes_a_step(overlay, as_agent, tmp_path):
    """One seed stands for the three: their commands differ in that number alone."""
    arguments = as_agent(GRID, {"config": overlay, "seed_everything": 2})
    root = make_camvid(tmp_path / "data", size=(40, 48))
    small = (*SMALL, f"--data.root={root}", "--data.crop_size=[40, 48]")
    cli = main([*arguments, *small])
    assert cli.trainer.global_step == 1


def test_every_corner_of_the_bayesian_search_parses(as_agent):
    corners = combinations(BAYES)
    assert len(corners) == 2 * 2 * 3 * 3
    for values in corners:
        config = resolve(*as_agent(BAYES, values))
        assert config[".model.optimizer.class_path"] == "torch.optim.AdamW"
        for key, value in values.items():
            expected = yaml.safe_load(value) if isinstance(value, str) else value
            assert config[f".{key}"] == expected


@pytest.mark.parametrize("number", range(9))
def test_run_of_the_bayesian_search_takes_a_step(number, as_agent, tmp_path):
    """Every crop with every window, at the ends of both rates in turn."""
    values = combinations(BAYES)[9 * (number % 4) + number]
    arguments = as_agent(BAYES, values)
    root = make_camvid(tmp_path / "data", size=(72, 96))
    cli = main([*arguments, *SMALL, f"--data.root={root}"])
    assert cli.trainer.global_step == 1


def test_early_termination_leaves_a_run_time_to_validate():
    schedule = yaml.safe_load((ROOT / BASE).read_text())["trainer"]  # a file beside it
    trainer = yaml.safe_load(((ROOT / BASE).parent / schedule).read_text())
    validations = trainer["max_steps"] // trainer["val_check_interval"]
    early = BAYES["early_terminate"]
    brackets = [early["min_iter"] * early["eta"] ** i for i in range(10)]
    assert [b for b in brackets if b < validations] == [2, 4]
    assert validations == 6
