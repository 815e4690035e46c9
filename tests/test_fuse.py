"""Folding for inference, and the plain formulation: the same answers by other ways."""

import copy

import pytest
import torch
from test_attention import randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isanet_pl.models import ISABlock, ISAModule, ISANet, SelfAttentionBlock2D, fuse_for_inference
from isanet_pl.models.fuse import FusedSelfAttention
from isanet_pl.models.isanet import Context
from isanet_pl.models.plain import plain_forward

CONTEXTS = Context.__args__


def small(**options):
    options = {"last_stage": 2, "key_channels": 8, "value_channels": 12, "out_channels": 16,
               **options}  # fmt: skip
    return randomise(ISANet(5, options.pop("backbone", "resnet18"), **options))


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def check(module, x, tolerance):
    module.eval()
    expected = module(x)
    fused = fuse_for_inference(module)
    found = fused(x)
    if isinstance(expected, dict):
        assert set(found) == {"out"}
        expected, found = expected["out"], found["out"]
    assert difference(found, expected) < tolerance
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    return fused


@pytest.mark.parametrize("form", ["direct", "reduced"])
@pytest.mark.parametrize("size", [(64, 64), (97, 65), (8, 120)])
def test_network_folds_exactly(form, size):
    check(
        small(form=form, down_factors=((4, 4),)).double(), torch.randn(2, 3, *size).double(), 1e-12
    )


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet50c", "resnet50s"])
def test_every_kind_of_backbone_folds(backbone):
    network = small(backbone=backbone, last_stage=4).double()
    check(network, torch.randn(1, 3, 65, 49).double(), 1e-12)


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_context_folds(context):
    for slope in (0.0, 0.01):
        network = small(context=context, negative_slope=slope).double()
        check(network, torch.randn(2, 3, 72, 56).double(), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"value_bias": True},
        {"mask_padding": True},
        {"context_first": True},
        {"negative_slope": 0.01},
        {"order": "short_long"},
        {"order": "long"},
        {"down_factors": ((3, 2), (2, 5))},
        {"down_factors": ((1, 1),)},
        {"down_factors": ((50, 50),)},
        {"aux_head": True, "ceil_mode": True},
    ],
)
def test_every_option_folds(options):
    check(small(**options).double(), torch.randn(1, 3, 88, 72).double(), 1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_parts_fold_as_well(size):
    x = torch.randn(2, 6, *size).double()
    for value_channels in (5, 9):  # narrower than the output, and wider
        block = randomise(SelfAttentionBlock2D(6, 4, value_channels, 7, value_bias=True)).double()
        assert isinstance(check(block, x, 1e-12), FusedSelfAttention)
    check(randomise(ISABlock(6, 4, 5, 7, (3, 2))).double(), x, 1e-12)
    check(randomise(ISAModule(6, 4, 5, 7, ((3, 2),))).double(), x, 1e-12)


def test_single_precision_is_close():
    # The tolerance of the contract, at the paper's widths.
    network = randomise(ISANet(19, "resnet18"))
    x = torch.randn(1, 3, 104, 72)
    fused = check(network, x, 1e-5)
    assert fused(x.to(memory_format=torch.channels_last))["out"].isfinite().all()


def test_the_original_is_left_alone():
    network = small().train()
    before = copy.deepcopy(network.state_dict())
    fused = fuse_for_inference(network)
    assert network.training
    assert not fused.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in fused.parameters())
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    pointers = {p.data_ptr() for p in network.parameters()}
    assert not pointers & {p.data_ptr() for p in fused.parameters()}


def test_folding_makes_the_network_smaller():
    network = small()
    fused = fuse_for_inference(network)
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in network.parameters())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.parametrize("context", CONTEXTS)
def test_folding_never_adds_arithmetic(context):
    network = small(context=context).eval()
    counts = []
    for each in (network, fuse_for_inference(network)):
        with FlopCounterMode(display=False) as counter:
            each(torch.randn(1, 3, 104, 104))
        counts.append(counter.get_total_flops())
    assert counts[1] <= counts[0]


def test_predict_of_a_folded_network():
    network = small()
    nn.init.normal_(network.classifier.weight)
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    expected = network.predict(image)
    assert len(expected.unique()) > 1
    found = fuse_for_inference(network).predict(image)
    assert (found == expected).float().mean() > 0.999


# The plain formulation, as published


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"context_first": True, "value_bias": True}, {"order": "short_long"}, {"order": "short"}],
)
@pytest.mark.parametrize(
    ("size", "window"), [((8, 12), (4, 3)), ((7, 10), (4, 3)), ((6, 6), (6, 2))]
)
def test_plain_formulation_is_the_same_function(train, options, size, window):
    module = randomise(ISAModule(6, 4, 5, 7, (window,), **options)).double().train(train)
    plain = copy.deepcopy(module)
    x = torch.randn(2, 6, *size).double()
    outputs, gradients = [], []
    for run, model in ((module, module), (lambda y: plain_forward(plain, y), plain)):
        y = x.clone().requires_grad_()
        out = run(y)
        (out * torch.linspace(-1, 2, out.numel()).double().view(out.shape)).sum().backward()
        outputs.append(out)
        gradients.append({"x": y.grad, **{n: p.grad for n, p in model.named_parameters()}})
    assert difference(outputs[0], outputs[1]) < 1e-9
    for name, gradient in gradients[1].items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((gradients[0][name] - gradient).abs().max()) / scale < 1e-9, name
    for (name, mine), theirs in zip(module.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-12), name


@pytest.mark.parametrize("form", ["direct", "reduced"])
def test_weights_in_the_dtype_of_autocast_change_nothing(form):
    network = randomise(
        ISANet(3, "resnet18", form=form, key_channels=8, value_channels=8, out_channels=8)
    ).eval()
    plain, converted = fuse_for_inference(network), fuse_for_inference(network, torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in converted.buffers()} == {torch.float32}  # mean and std
    image = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = (net(net.normalise(image))["out"] for net in (plain, converted))
    assert torch.equal(expected, found)


# What is kept for the backward pass


def test_training_keeps_less_than_half_of_the_plain_formulation(scripts_on_path):
    from benchmarking.measuring import saved_mib

    # The published widths, divided by 16.
    module = ISAModule(128, 16, 32, 32).to(memory_format=torch.channels_last)
    x = torch.randn(2, 128, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
    ours = saved_mib(module, x, module)
    plain = saved_mib(lambda y: plain_forward(module, y), x, module)
    assert ours < 0.5 * plain
    keeping = ISAModule(128, 16, 32, 32, recompute=False).to(memory_format=torch.channels_last)
    assert 1.3 * ours < saved_mib(keeping, x, keeping) < plain
    dense = SelfAttentionBlock2D(128, 16, 32, 32, recompute=False)
    assert ours < 0.1 * saved_mib(dense, x, dense)  # at these widths the affinity is most of it


def test_computing_again_leaves_running_statistics_alone():
    block = randomise(SelfAttentionBlock2D(6, 4, 5, 7))
    keeping = copy.deepcopy(block)
    keeping.recompute = False
    x = torch.randn(2, 6, 5, 7)
    for model in (block, keeping):
        for _ in range(2):
            model(x).square().sum().backward()
    for (name, mine), theirs in zip(block.named_buffers(), keeping.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert block.f_key[1].num_batches_tracked == 2
    assert block.f_key[1].momentum == 0.1
    for (name, mine), theirs in zip(block.named_parameters(), keeping.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6), name
