"""What of a checkpoint may differ from the config, and what may not."""

import pytest
import torch

from isanet_pl.agreement import check_agreement
from isanet_pl.errors import InputError

ARGUMENTS = {"backbone": "resnet18", "down_factors": [[8, 8]], "dropout": 0.05, "value_bias": False}
STATE = {"weight": torch.ones(2, 3), "count": torch.tensor(1)}
CLASSES = ["road", "car"]


def make_checkpoint(network=None, tensors=None, **more):
    parameters = {"network": ARGUMENTS | (network or {}), "class_names": CLASSES} | more
    return {"hyper_parameters": parameters, "state_dict": STATE | (tensors or {})}


def check(checkpoint):
    check_agreement(checkpoint, ARGUMENTS, CLASSES, STATE)


@pytest.mark.parametrize(
    "checkpoint",
    [
        make_checkpoint(),
        make_checkpoint({"dropout": 0.5}),  # changes nothing of what was trained
        make_checkpoint({"value_bias": None}),  # its default, which the form of the network sets
        make_checkpoint({"down_factors": ((8, 8),)}),
        make_checkpoint({"down_factors": [[8.0, 8.0]]}),  # one number, however it is spelt
        {"state_dict": STATE},  # says nothing of itself
    ],
)
def test_equal_networks_pass(checkpoint):
    check(checkpoint)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            make_checkpoint({"down_factors": [[4, 4]]}),
            r"model\.network\.down_factors: checkpoint \[\[4, 4\]\], config \[\[8, 8\]\]",
        ),
        (make_checkpoint({"value_bias": True}), "value_bias: checkpoint True, config False"),
        (make_checkpoint({"gates": 3}), "gates: checkpoint 3, but this version has no such option"),
        (make_checkpoint(class_names=["road"]), r"for 1 classes \(road\), but the data has 2"),
        (make_checkpoint(class_names=["car", "road"]), r"\(car, road\), .* \(road, car\)"),
        (make_checkpoint(tensors={"weight": torch.ones(3, 2)}), "1 of its 2 tensors .* weight"),
        (make_checkpoint(tensors={"more": torch.ones(1)}), "1 of its 2 tensors .* more"),
        (
            make_checkpoint(tensors={"weight": torch.full((2, 3), torch.nan)}),
            "weight is not finite",
        ),
    ],
)
def test_what_computes_something_else_is_refused(checkpoint, message):
    with pytest.raises(InputError, match=message):
        check(checkpoint)
