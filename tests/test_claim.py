"""The paper's claim in miniature: what needs context from afar is learnt by both stages together.

A shortened quick start, trained for real. That neither stage alone can learn it is in
test_synthetic.py; `scripts/ablate.py` makes the long form, with dense attention and over seeds.
"""

import json
from pathlib import Path

import pytest

from isanet_pl.cli import main

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def score(seed, runs):
    """Returns the mIoU that a run reaches."""
    options = {
        "--seed_everything": seed,
        "--data.batch_size": 8,
        "--data.num_workers": 0,
        "--trainer.max_steps": 200,
        "--trainer.val_check_interval": 200,
        "--trainer.enable_progress_bar": "false",
        "--runs_dir": runs,
    }
    arguments = [str(part) for pair in options.items() for part in pair]
    trainer = main(["fit", "--config", str(QUICKSTART), *arguments]).trainer
    return float(trainer.callback_metrics["val/miou"])


@pytest.mark.slow
def test_both_stages_together_find_the_lamp(tmp_path):
    # 0.88; whoever finds the balls and guesses their class has 0.24. In so few steps some seeds
    # still do, which ones depends on the machine's rounding: a second one is tried.
    assert any(score(seed, tmp_path) > 0.8 for seed in (1, 2))


def test_the_published_runs_show_it():
    """Every seed, in the long form, whose table the README has."""
    file = QUICKSTART.parent.parent / "docs" / "results" / "quickstart.json"
    [comparison] = json.loads(file.read_text("utf-8"))
    scores = {
        setting["label"]: [run["result"]["scores"]["miou"] for run in setting["runs"].values()]
        for setting in comparison["settings"]
    }
    assert {len(found) for found in scores.values()} == {3}
    solved = {label for label, found in scores.items() if min(found) > 0.9}
    guessed = {label for label, found in scores.items() if max(found) < 0.3}
    assert solved == {"base", "context_dense"}
    assert guessed == {"context_none", "order_long", "order_short"}
