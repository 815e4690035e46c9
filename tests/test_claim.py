"""The paper's claim in miniature: what needs context from afar is learnt by both stages together.

A shortened quick start for each kind of context, trained for real. The mIoU of a network that finds
the balls but guesses their class is about 0.25: a class told rightly one time in four has an IoU of
1/7, and the background is almost perfect. `scripts/ablate.py` makes the long form, over seeds.
"""

from pathlib import Path

import pytest

from isanet_pl.cli import main

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        pytest.param({"context": "isa"}, 0.75, 1.0, id="isa"),
        pytest.param({"context": "dense"}, 0.5, 1.0, id="dense"),  # learns it more slowly
        pytest.param({"order": "long"}, 0.2, 0.4, id="long alone"),
        pytest.param({"order": "short"}, 0.2, 0.4, id="short alone"),
        pytest.param({"context": "none"}, 0.2, 0.4, id="none"),
    ],
)
def test_only_both_stages_together_find_the_lamp(options, least, most, tmp_path):
    shortened = {
        "--data.batch_size": 8,
        "--data.num_workers": 0,
        "--trainer.max_steps": 200,
        "--trainer.val_check_interval": 200,
        "--trainer.enable_progress_bar": "false",
        "--runs_dir": tmp_path,
        **{f"--model.network.{name}": value for name, value in options.items()},
    }
    arguments = [str(part) for pair in shortened.items() for part in pair]
    trainer = main(["fit", "--config", str(QUICKSTART), *arguments]).trainer
    assert least < float(trainer.callback_metrics["val/miou"]) < most
