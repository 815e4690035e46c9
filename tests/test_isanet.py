"""The network in both forms, its backbone and the loading of weights."""

import copy
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from isanet_pl.models import Backbone, ISANet, SelfAttentionBlock2D
from isanet_pl.models.layers import SameConv
from isanet_pl.models.weights import load_weights

SMALL = {
    "num_classes": 5,
    "backbone": "resnet18",
    "key_channels": 8,
    "value_channels": 8,
    "out_channels": 16,
    "aux_channels": 8,
}


def small_net(**arguments):
    return ISANet(**{**SMALL, **arguments})


@pytest.fixture(scope="module")
def direct():
    torch.manual_seed(0)
    return small_net(form="direct")


@pytest.fixture(scope="module")
def reduced():
    torch.manual_seed(0)
    return small_net(form="reduced")


@pytest.fixture
def net(request):
    """A copy of the network that the test names, to be changed at will."""
    return copy.deepcopy(request.getfixturevalue(request.param))


both_forms = pytest.mark.parametrize("net", ["direct", "reduced"], indirect=True)


# What comes out.


@both_forms
@pytest.mark.parametrize("size", [(65, 97), (64, 40), (1, 1), (1, 50)])
def test_eval_output_has_the_size_of_the_input(net, size):
    outputs = net.eval()(torch.randn(1, 3, *size))
    assert set(outputs) == {"out"}  # the auxiliary head is for training only
    assert outputs["out"].shape == (1, 5, *size)
    assert outputs["out"].isfinite().all()


@pytest.mark.parametrize(
    ("net", "keys"), [("direct", {"out"}), ("reduced", {"out", "aux"})], indirect=["net"]
)
def test_train_output(net, keys):
    outputs = net.train()(torch.randn(2, 3, 33, 49))
    assert set(outputs) == keys
    assert all(logits.shape == (2, 5, 33, 49) for logits in outputs.values())


@pytest.mark.parametrize(("form", "aux_head"), [("direct", True), ("reduced", False)])
def test_auxiliary_head_can_be_chosen(form, aux_head):
    net = small_net(form=form, aux_head=aux_head, last_stage=2)
    outputs = net.train()(torch.randn(2, 3, 32, 32))
    assert ("aux" in outputs) == aux_head
    assert any(name.startswith("aux_head") for name in net.state_dict()) == aux_head


@pytest.mark.parametrize("net", ["reduced"], indirect=True)
def test_auxiliary_head_sees_the_stage_before_the_last(net):
    assert net.aux_head[0].weight.shape == (8, 256, 3, 3)  # layer 3 of ResNet-18
    calls = {}
    net.backbone.net["layer3"].register_forward_hook(lambda _, args, out: calls.update(layer3=out))
    net.aux_head.register_forward_hook(lambda _, args, out: calls.update(x=args[0], y=out))
    aux = net.train()(torch.randn(2, 3, 33, 49))["aux"]
    assert calls["x"].equal(calls["layer3"])
    expected = F.interpolate(calls["y"], (33, 49), mode="bilinear", align_corners=False)
    torch.testing.assert_close(aux, expected)


@pytest.mark.parametrize("corners", [None, False, True])
@pytest.mark.parametrize(
    ("form", "early", "small_first"),
    [
        ("direct", False, False),
        ("direct", True, True),
        ("reduced", False, True),
        ("reduced", True, True),
    ],
)
def test_classifier_and_upsampling(form, early, small_first, corners):
    net = small_net(
        form=form, classify_before_upsampling=early, align_corners=corners, last_stage=2
    ).eval()
    align = corners if corners is not None else form == "direct"
    calls = {}
    net.classifier.register_forward_hook(lambda _, args, out: calls.update(x=args[0], y=out))
    net.context.register_forward_hook(lambda _, args, out: calls.update(context=out))
    logits = net(torch.randn(1, 3, 41, 48))["out"]
    assert calls["context"].shape == (1, 16, 6, 6)
    if small_first:
        assert calls["y"].shape == (1, 5, 6, 6)
        expected = F.interpolate(calls["y"], (41, 48), mode="bilinear", align_corners=align)
        torch.testing.assert_close(logits, expected)
    else:
        features = F.interpolate(
            net.project(calls["context"]), (41, 48), mode="bilinear", align_corners=align
        )
        torch.testing.assert_close(calls["x"], features)
        assert logits.equal(calls["y"])


def test_forms_have_their_published_layers(direct, reduced):
    assert isinstance(direct.reduce, nn.Identity)
    assert direct.context.stages[0].long_range_sa.f_value.weight.shape == (8, 512, 1, 1)
    assert direct.project[0].weight.shape == (16, 16, 3, 3)
    assert direct.project[0].bias is not None
    assert direct.classifier.kernel_size == (3, 3)
    assert direct.classifier.bias is not None
    assert direct.context.dropout.p == 0
    assert reduced.reduce[0].weight.shape == (16, 512, 3, 3)
    assert reduced.context.stages[0].long_range_sa.f_value.weight.shape == (8, 16, 1, 1)
    assert isinstance(reduced.project, nn.Identity)
    assert reduced.classifier.kernel_size == (1, 1)
    assert reduced.context.dropout.p == 0.1


def test_attention_arguments_arrive():
    net = small_net(
        down_factors=[(2, 3), (4, 4)],
        order="short_long",
        mask_padding=True,
        value_bias=True,
        context_first=True,
        ceil_mode=True,
        dropout=0.3,
        last_stage=1,
    )
    assert [stage.down_factor for stage in net.context.stages] == [(2, 3), (4, 4)]
    for stage in net.context.stages:
        assert stage.ranges == ["short", "long"]
        assert stage.mask_padding
        assert stage.short_range_sa.f_value.bias is not None
        assert stage.long_range_sa.f_value.bias is not None
    assert net.context.context_first
    assert net.context.dropout.p == 0.3
    assert net.backbone.net["maxpool"].ceil_mode


@pytest.mark.parametrize("form", ["direct", "reduced"])
def test_context_none_has_no_attention(form):
    net = small_net(form=form, context="none", last_stage=2)
    assert not any("range_sa" in name for name in net.state_dict())
    assert net.eval()(torch.randn(1, 3, 33, 40))["out"].shape == (1, 5, 33, 40)


@both_forms
def test_every_parameter_gets_a_finite_gradient(net):
    outputs = net.train()(torch.randn(2, 3, 33, 41))
    sum(logits.square().sum() for logits in outputs.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_network_can_be_rebuilt_from_its_arguments():
    net = small_net(form="reduced", last_stage=1, order="short").eval()
    other = ISANet(**net.arguments).eval()
    other.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 30, 40)
    assert other(x)["out"].equal(net(x)["out"])


def test_one_class_is_refused():
    with pytest.raises(ValueError, match=r"num_classes must be 2 to 254 .*got 1"):
        ISANet(1, "resnet18")


# Images in.


def test_normalise_by_hand(direct):
    image = torch.tensor([[0, 255, 100], [10, 20, 30]], dtype=torch.uint8).repeat(2, 3, 1, 1)
    x = direct.normalise(image)
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 2, 3)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x[0, 0, 0, 1].item() == pytest.approx((255 - 123.675) / 58.395)
    assert x[0, 1, 0, 0].item() == pytest.approx((0 - 116.28) / 57.12)
    assert x[1, 2, 1, 2].item() == pytest.approx((30 - 103.53) / 57.375)


def test_normalise_takes_other_statistics():
    net = small_net(mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0), last_stage=1)
    x = net.normalise(torch.full((1, 3, 2, 2), 11, dtype=torch.uint8))
    assert x[0, :, 0, 0].tolist() == [5, 2.25, 1]


@pytest.fixture
def photo():
    pixels = torch.randint(256, (3, 6, 8), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return picture.resize((45, 33), Image.Resampling.BICUBIC)


@pytest.fixture
def predictor(direct):
    """A network whose class map has more than one class."""
    net = copy.deepcopy(direct)
    nn.init.normal_(net.classifier.weight)
    return net


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "CMYK"])
def test_predict_takes_any_picture(predictor, photo, mode):
    picture = photo.convert(mode)
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = predictor.eval()(x[None])["out"][0].argmax(dim=0)
    assert len(expected.unique()) > 1

    prediction = predictor.train().predict(picture)
    assert not predictor.training
    assert prediction.dtype == torch.uint8
    assert prediction.shape == (33, 45)
    # Another memory order rounds differently, which may decide a tie, no more.
    assert (prediction == expected).float().mean() > 0.99


def test_predict_takes_a_tensor(predictor, photo):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    assert predictor.predict(pixels).equal(predictor.predict(photo))


def test_a_predicted_class_map_may_be_changed(predictor, photo):
    classes = predictor.predict(photo)
    classes[classes == classes[0, 0]] = 255
    assert classes[0, 0] == 255


def test_predict_does_not_change_the_weights(predictor, photo):
    before = {k: v.clone() for k, v in predictor.train().state_dict().items()}
    predictor.predict(photo)
    assert all(v.equal(before[k]) for k, v in predictor.state_dict().items())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"torch.float32 \(3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"torch.int64 \(3, 8, 8\)"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"torch.uint8 \(8, 8\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"torch.uint8 \(8, 8, 3\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8 \(1, 3, 8, 8\)"),
    ],
)
def test_predict_refuses_other_tensors(direct, image, message):
    with pytest.raises(ValueError, match=r"predict takes a PIL image .* got " + message):
        direct.predict(image)


# The backbone.


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (256, 512)),
        ("resnet34", (256, 512)),
        ("resnet50", (1024, 2048)),
        ("resnet101", (1024, 2048)),
        ("resnet50c", (1024, 2048)),
        ("resnet101c", (1024, 2048)),
    ],
)
def test_backbone_maps(name, channels, output_stride):
    with torch.device("meta"):  # shapes without arithmetic
        backbone = Backbone(name, output_stride)
        before, last = backbone(torch.zeros(2, 3, 64, 64))
    assert backbone.channels == channels
    side = 64 // output_stride
    assert before.shape == (2, channels[0], side, side)
    assert last.shape == (2, channels[1], side, side)
    # A stride that is left out becomes a dilation of what follows.
    dilations = {conv.dilation for conv in last_convs(backbone)}
    assert dilations == {(4, 4) if output_stride == 8 else (2, 2)}


def last_convs(backbone):
    """Returns the 3x3 convs of the last residual block."""
    convs = [m for m in backbone.net["layer4"][-1].modules() if isinstance(m, nn.Conv2d)]
    return [conv for conv in convs if conv.kernel_size == (3, 3)]


def test_backbone_runs_without_dilation():
    with torch.device("meta"):
        before, last = Backbone("resnet18", output_stride=32)(torch.zeros(1, 3, 64, 64))
    assert (before.shape[2:], last.shape[2:]) == ((4, 4), (2, 2))


@pytest.mark.parametrize("last_stage", [1, 2, 3, 4])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_the_stride_is_that_of_the_last_map(output_stride, last_stage):
    with torch.device("meta"):
        network = ISANet(2, "resnet18", output_stride, last_stage, context="aspp", out_channels=4)
        stride = 64 // network.backbone(torch.zeros(1, 3, 64, 64))[1].shape[2]
    assert network.output_stride == stride == min(output_stride, 2 ** (last_stage + 1))
    dilations = {branch[0].dilation[0] * stride for branch in network.context.branches[1:]}
    assert dilations == {96, 192, 288}  # 12, 24 and 36 at stride 8, as in DeepLabV3


@pytest.mark.parametrize(
    ("last_stage", "channels", "sides"),
    [(1, (64, 64), (32, 16)), (2, (64, 128), (16, 8)), (3, (128, 256), (8, 8))],
)
def test_last_stage_leaves_the_later_ones_out(last_stage, channels, sides):
    with torch.device("meta"):
        backbone = Backbone("resnet18", last_stage=last_stage)
        maps = backbone(torch.zeros(1, 3, 64, 64))
    assert backbone.channels == channels
    assert tuple(m.shape[1:] for m in maps) == tuple(
        (c, s, s) for c, s in zip(channels, sides, strict=True)
    )
    stages = {name.split(".")[0] for name in backbone.net.state_dict()}
    assert stages == {"conv1", "bn1", *(f"layer{i + 1}" for i in range(last_stage))}


def test_backbone_equals_timm(resnet18):
    torch.manual_seed(1)
    theirs = timm.create_model("resnet18", output_stride=8).eval()
    ours = copy.deepcopy(resnet18).eval()
    load_weights(ours.net, theirs.state_dict(), "the backbone", "timm")
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[1], theirs.forward_features(x))


@pytest.mark.parametrize("mixed", [False, True])
def test_backbone_trains_as_timm(resnet18, mixed):
    torch.manual_seed(1)
    theirs = timm.create_model("resnet18", output_stride=8).eval()
    for name, weight in theirs.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.ones_(weight)  # timm starts with zero, and then most gradients are zero
    ours = copy.deepcopy(resnet18).eval()
    load_weights(ours.net, theirs.state_dict(), "the backbone", "timm")
    assert sum(isinstance(m, SameConv) for m in ours.modules()) == 17
    x = torch.randn(2, 3, 40, 48)
    for run in (lambda: ours(x)[1], lambda: theirs.forward_features(x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            run().float().square().mean().backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.net.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad - expected).norm() < (0.3 if mixed else 1e-3) * expected.norm(), name


def test_ceil_mode_rounds_up():
    with torch.device("meta"):
        x = torch.zeros(1, 3, 128, 128)
        assert Backbone("resnet18")(x)[1].shape[2:] == (16, 16)
        assert Backbone("resnet18", ceil_mode=True)(x)[1].shape[2:] == (17, 17)


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"no model named 'resnet19'; ResNets are: .*resnet18"):
        Backbone("resnet19")


@pytest.mark.parametrize(
    "name",
    ["regnety_002", "efficientnet_b0", "vit_tiny_patch16_224", "vgg11", "mobilenetv3_small_100"],
)
def test_backbone_that_is_no_resnet_is_refused(name):
    with torch.device("meta"), pytest.raises(ValueError, match=name):
        Backbone(name)


# Weights.


@pytest.fixture(scope="module")
def resnet18():
    """A backbone to be copied, not changed."""
    torch.manual_seed(0)
    return Backbone("resnet18")


@pytest.fixture
def network(direct):
    return copy.deepcopy(direct)


@pytest.fixture(scope="module")
def weights(resnet18):
    """Values unlike the initial ones, for all of ResNet-18."""
    torch.manual_seed(1)
    state = resnet18.net.state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


def part_of(weights, *stages):
    return {k: v for k, v in weights.items() if k.split(".")[0] in stages}


def assert_loaded(net, weights, fresh):
    """What is in `weights` is in the backbone, and the rest of the network is as in `fresh`."""
    weights = {f"backbone.net.{name}": value for name, value in weights.items()}
    assert net.loaded == set(weights)
    start = fresh.state_dict()
    for name, value in net.state_dict().items():
        assert value.dtype == start[name].dtype
        assert value.equal(weights.get(name, start[name]).to(value.dtype)), name


def test_part_of_a_file_loads_and_the_log_says_so(network, direct, weights, tmp_path, caplog):
    part = part_of(weights, "conv1", "bn1", "layer1")
    path = tmp_path / "part.pth"
    torch.save({**part, "fc.weight": torch.zeros(2, 2)}, path)
    with caplog.at_level(logging.INFO, logger="isanet_pl"):
        network.load_file(path)
    assert_loaded(network, part, direct)
    assert len(part) == 30
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("isanet_pl")]
    assert f"resnet18: loaded 30 tensors from {path}" in message
    # Five layers of a conv (1 tensor) and a BatchNorm (4, its counter left out) in each stage.
    assert "initialised anew: layer2 (25), layer3 (25), layer4 (25); not used: fc (1)" in message


def test_complete_file_leaves_nothing_out(network, direct, weights, tmp_path, caplog):
    torch.save(weights, tmp_path / "all.pth")
    with caplog.at_level(logging.INFO, logger="isanet_pl"):
        network.load_file(str(tmp_path / "all.pth"))
    assert_loaded(network, weights, direct)
    assert "initialised anew: nothing; not used: nothing" in caplog.text


def test_a_backbone_of_mmsegmentation_brings_its_stem(tmp_path):
    """ResNetV1c's stem is conv, BatchNorm, ReLU three times: stem.0, 1, 3, 4, 6 and 7."""
    network = ISANet(2, "resnet50c", last_stage=1, key_channels=4, value_channels=4, out_channels=4)
    net = network.backbone.net
    stem = [layer for layer in (*net.conv1, net.bn1) if list(layer.parameters())]
    numbers = (0, 1, 3, 4, 6, 7)
    state = {
        f"stem.{number}.{name}": torch.rand_like(value) if value.is_floating_point() else value
        for number, layer in zip(numbers, stem, strict=True)
        for name, value in layer.state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "v1c.pth")
    network.load_file(tmp_path / "v1c.pth")
    assert len(network.loaded) == len(state)
    for number, layer in zip(numbers, stem, strict=True):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[f"stem.{number}.{name}"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_weights_load(network, direct, weights, tmp_path, wrapper):
    part = part_of(weights, "layer2")
    torch.save({wrapper: part, "epoch": 3}, tmp_path / "wrapped.pth")
    network.load_file(tmp_path / "wrapped.pth")
    assert_loaded(network, part, direct)


@pytest.mark.parametrize("recompute", [True, False])
def test_all_blocks_compute_again_or_none(recompute):
    small = {"last_stage": 1, "key_channels": 4, "value_channels": 4, "out_channels": 4}
    network = ISANet(3, "resnet18", **small, down_factors=[(4, 4), (2, 2)], recompute=recompute)
    blocks = [m for m in network.modules() if isinstance(m, SelfAttentionBlock2D)]
    assert [block.recompute for block in blocks] == [recompute] * 4


def test_whole_numbers_of_the_normalisation_are_as_a_config_has_them():
    small = {"last_stage": 1, "context": "none", "out_channels": 4}
    network = ISANet(3, "resnet18", **small, mean=(1, 2, 3), std=(1, 1, 1))
    assert json.dumps(network.arguments["mean"]) == "[1.0, 2.0, 3.0]"
    assert json.dumps(network.arguments["std"]) == "[1.0, 1.0, 1.0]"
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert network.double().predict(image).shape == (8, 8)


def test_half_precision_weights_load(network, direct, weights, tmp_path):
    half = {k: v.half() for k, v in part_of(weights, "layer3").items()}
    torch.save(half, tmp_path / "half.pth")
    network.load_file(tmp_path / "half.pth")
    assert_loaded(network, half, direct)


def test_file_that_matches_nothing_is_refused(network, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"encoder.weight": torch.zeros(2)}, path)
    with pytest.raises(
        ValueError, match=rf"{path} holds no weight of .*resnet18.*encoder\.weight.*conv1\.weight"
    ):
        network.load_file(path)
    assert not network.loaded


@pytest.mark.parametrize("key", ["decode_head.conv_seg.weight", "module.isa_head.0.weight"])
def test_a_network_of_other_code_is_sent_to_the_converter(network, tmp_path, key):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"backbone.stem.0.weight": torch.zeros(2), key: torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=rf"{path} is a network of .*convert_checkpoint\.py"):
        network.load_file(path)
    assert not network.loaded


def test_wrong_shape_is_refused_before_anything_is_copied(network, direct, weights, tmp_path):
    path = tmp_path / "wide.pth"
    torch.save({**weights, "layer4.1.conv2.weight": torch.zeros(512, 512, 1, 1)}, path)
    message = rf"{path}: layer4\.1\.conv2\.weight is \(512, 512, 1, 1\), but \(512, 512, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        network.load_file(path)
    assert_loaded(network, {}, direct)


def test_missing_file_is_named(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        network.load_file(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        network.load_file(tmp_path)  # a folder


def test_truncated_file_is_refused(network, weights, tmp_path):
    path = tmp_path / "whole.pth"
    torch.save(part_of(weights, "layer1"), path)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut\.pth is not a PyTorch weights file"):
        network.load_file(cut)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_other_file_is_refused(network, tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pth is not a PyTorch weights file"):
        network.load_file(path)


def test_file_without_names_is_refused(network, tmp_path):
    path = tmp_path / "tensor.pth"
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"tensor\.pth holds a Tensor, not a state dict"):
        network.load_file(path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_executed(network, tmp_path):
    path, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    torch.save({"conv1.weight": Trap(sprung)}, path)
    with pytest.raises(ValueError, match=r"trap\.pth .* holds more than tensors"):
        network.load_file(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap does work


def test_network_loads_weights_into_its_backbone(weights, tmp_path):
    part = part_of(weights, "conv1", "bn1", "layer1")
    torch.save(part, tmp_path / "part.pth")
    net = small_net(weights_path=str(tmp_path / "part.pth"), last_stage=1)
    assert net.loaded == {f"backbone.net.{name}" for name in part}
    assert net.backbone.net["conv1"].weight.equal(part["conv1.weight"])


def test_pretrained_and_weights_path_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"weights_path .*--model.network.pretrained false"):
        small_net(pretrained=True, weights_path=str(tmp_path / "any.pth"))


def test_pretrained_takes_what_timm_loads(weights, monkeypatch):
    create_model = timm.create_model
    asked_for = []

    def without_download(name, pretrained=False, **arguments):
        model = create_model(name, **arguments)
        if pretrained:
            asked_for.append(name)
            model.load_state_dict(weights, strict=False)
        return model

    monkeypatch.setattr(timm, "create_model", without_download)
    net = small_net(pretrained=True)
    assert asked_for == ["resnet18"]
    assert net.loaded == {f"backbone.net.{name}" for name in weights}
    for name, value in net.backbone.net.state_dict().items():
        assert value.equal(weights[name]), name
    assert small_net().loaded == set()
    assert asked_for == ["resnet18"]  # not without pretrained


@pytest.mark.skipif(not os.environ.get("ISANET_TEST_DATA"), reason="ISANET_TEST_DATA is not set")
@pytest.mark.parametrize(
    ("name", "file", "num_tensors"),
    [
        ("resnet18", "resnet18_stages1-3.pth", 91),
        ("resnet50", "resnet50_stages1-3_fp16.pth", 258),
    ],
)
def test_real_weights_load(name, file, num_tensors):
    net = small_net(backbone=name)
    net.load_file(Path(os.environ["ISANET_TEST_DATA"], "weights", file))
    assert len(net.loaded) == num_tensors
    assert {k.split(".")[2] for k in net.loaded} >= {"conv1", "bn1", "layer1", "layer3"}
    assert all(v.isfinite().all() for v in net.backbone.state_dict().values())
    assert net.backbone.net["conv1"].weight.dtype == torch.float32


# A whole network.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a network of 5 classes; no value in it is an initial one."""
    torch.manual_seed(2)
    trained = small_net(form="reduced")
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            tensor.add_(torch.rand(tensor.shape).to(tensor.dtype) + 1)
    path = tmp_path_factory.mktemp("trained") / "trained.ckpt"
    content = {
        "state_dict": {f"network.{k}": v for k, v in trained.state_dict().items()},
        "hyper_parameters": {"network": trained.arguments},
    }
    torch.save(content, path)
    return path


def test_a_checkpoint_fills_the_whole_network(checkpoint, caplog):
    trained = ISANet.from_checkpoint(checkpoint)
    with caplog.at_level(logging.INFO, logger="isanet_pl"):
        net = small_net(form="reduced", weights_path=str(checkpoint))
    assert net.loaded == set(net.state_dict())
    for name, value in net.state_dict().items():
        assert value.equal(trained.state_dict()[name]), name
    assert "initialised anew: nothing; not used: nothing" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_only_the_classifiers_of_other_classes_start_anew(checkpoint, caplog):
    trained = ISANet.from_checkpoint(checkpoint).state_dict()
    torch.manual_seed(3)
    fresh = small_net(form="reduced", num_classes=3)
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO, logger="isanet_pl"):
        net = small_net(form="reduced", num_classes=3, weights_path=str(checkpoint))
    anew = {"classifier.weight", "classifier.bias", "aux_head.4.weight", "aux_head.4.bias"}
    assert net.state_dict().keys() - net.loaded == anew
    for name, value in net.state_dict().items():
        assert value.equal((fresh.state_dict() if name in anew else trained)[name]), name
    assert "initialised anew: classifier (2), aux_head (2); not used: nothing" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_an_auxiliary_head_may_be_left_out_or_added(checkpoint, tmp_path):
    net = small_net(form="reduced", aux_head=False, weights_path=str(checkpoint))
    assert net.loaded == set(net.state_dict())
    content = torch.load(checkpoint, weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if "aux_head" not in k}
    torch.save(content, tmp_path / "without.ckpt")
    net = small_net(form="reduced", weights_path=str(tmp_path / "without.ckpt"))
    assert {k for k in net.state_dict() if k not in net.loaded} == {
        k for k in net.state_dict() if k.startswith("aux_head.")
    }


def test_weights_of_another_function_are_taken_with_a_warning(checkpoint, caplog):
    net = small_net(form="reduced", down_factors=((4, 4),), weights_path=str(checkpoint))
    assert net.loaded == set(net.state_dict())
    assert "down_factors: checkpoint ((8, 8),), config ((4, 4),)" in caplog.text


def test_an_auxiliary_head_of_another_width_is_refused_with_what_differs(checkpoint):
    message = r"aux_head\.0\.weight is .* model\.network\.aux_channels: checkpoint 8, config 4"
    with pytest.raises(ValueError, match=message):
        small_net(form="reduced", aux_channels=4, weights_path=str(checkpoint))


def test_a_network_that_does_not_fit_is_refused_with_what_differs(checkpoint):
    message = r"trained\.ckpt: .* model\.network\.out_channels: checkpoint 16, config 8"
    with pytest.raises(ValueError, match=message):
        small_net(form="reduced", out_channels=8, weights_path=str(checkpoint))


@pytest.mark.parametrize("form", ["direct", "reduced"])
def test_logits_are_enlarged_in_fp32(form):
    # In bf16 neighbouring classes tie where they meet.
    net = small_net(form=form, classify_before_upsampling=True, aux_head=True)
    for mode in (True, False):
        net.train(mode)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs = net(torch.randn(2, 3, 32, 40))
        assert {logits.dtype for logits in outputs.values()} == {torch.float32}
        assert len(outputs) == 1 + mode
    assert net.double()(torch.randn(1, 3, 32, 40).double())["out"].dtype == torch.float64


def test_classifiers_start_as_in_mmsegmentation():
    net = small_net(form="reduced", num_classes=40, aux_head=True, aux_channels=64)
    for classifier in (net.classifier, net.aux_head[-1]):
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert not classifier.bias.any()


def test_heads_start_as_in_mmsegmentation():
    torch.manual_seed(0)
    net = small_net(form="reduced", key_channels=48, value_channels=64, out_channels=64)
    block = net.context.stages[0].long_range_sa
    for conv in (net.reduce[0], block.f_key[3], block.W[0], net.context.conv_bn[0]):
        fan_out = conv.weight.shape[0] * conv.kernel_size[0] ** 2
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    bound = block.f_value.weight.shape[1] ** -0.5  # a bare conv, that keeps PyTorch's own
    assert 0.9 * bound < block.f_value.weight.abs().max().item() <= bound
