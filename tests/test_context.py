"""The modules that ISA is compared with, against plain formulations and their papers' claims."""

import pytest
import torch
import torch.nn.functional as F
from test_attention import randomise
from torch import nn

from isanet_pl.models import ISANet
from isanet_pl.models.context import (
    AtrousPyramid,
    CrissCrossAttention,
    DenseAttention,
    NoContext,
    PyramidPooling,
    RecurrentCrissCross,
)
from isanet_pl.models.isanet import Context

MODULES = {
    "none": lambda: NoContext(6, 8),
    "dense": lambda: DenseAttention(6, 4, 8),
    "dense_sdpa": lambda: DenseAttention(6, 4, 8, sdpa=True),
    "ppm": lambda: PyramidPooling(6, 8),
    "aspp": lambda: AtrousPyramid(6, 8),
    "rcca": lambda: RecurrentCrissCross(6, 8),
}


def make(name):
    module = randomise(MODULES[name]()).double().eval()
    for part in module.modules():
        if isinstance(part, CrissCrossAttention):
            torch.nn.init.constant_(part.gamma, 0.7)  # it starts at zero
    return module


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (16, 16)])
def test_any_size_comes_out_as_it_went_in(name, size):
    assert make(name)(torch.randn(2, 6, *size).double()).shape == (2, 8, *size)


def reach(module, size, at):
    """Returns a bool map of the positions that the output at one position depends on."""
    x = torch.randn(1, 6, *size).double().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0, :, at[0], at[1]].square().sum(), x)
    return gradient[0].abs().sum(0) > 0


@pytest.mark.parametrize("name", MODULES)
def test_reach(name):
    module = make(name)
    for part in list(module.modules()):
        for child, layer in part.named_children():
            if isinstance(layer, nn.ReLU):  # it would hide what is behind it
                setattr(part, child, nn.Softplus())
    seen = reach(module, (80, 60), (10, 7))
    assert seen.sum() == 1 if name == "none" else seen.all()


def test_one_criss_cross_reaches_row_and_column_and_two_reach_all():
    attention = CrissCrossAttention(6, 4).double()
    torch.nn.init.ones_(attention.gamma)
    expected = torch.zeros(9, 11, dtype=torch.bool)
    expected[3], expected[:, 8] = True, True
    assert torch.equal(reach(attention, (9, 11), (3, 8)), expected)
    assert reach(lambda x: attention(attention(x)), (9, 11), (3, 8)).all()


def test_criss_cross_against_loops():
    attention = CrissCrossAttention(6, 4).double()
    torch.nn.init.constant_(attention.gamma, 0.3)
    x = torch.randn(2, 6, 4, 5).double()
    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    expected = x.clone()
    for n in range(2):
        for i in range(4):
            for j in range(5):
                path = [(i, b) for b in range(5)] + [(a, j) for a in range(4) if a != i]
                scores = torch.stack([query[n, :, i, j] @ key[n, :, a, b] for a, b in path])
                weights = scores.softmax(0)
                context = sum(
                    w * value[n, :, a, b] for w, (a, b) in zip(weights, path, strict=True)
                )
                expected[n, :, i, j] += 0.3 * context
    assert torch.allclose(attention(x), expected, atol=1e-10)


def test_criss_cross_starts_as_the_identity():
    x = torch.randn(1, 6, 4, 5)
    assert torch.equal(CrissCrossAttention(6, 4)(x), x)


@pytest.mark.parametrize("train", [True, False])
def test_both_forms_of_dense_attention_are_the_same_function(train):
    plain = make("dense").train(train)
    fused = make("dense_sdpa").train(train)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 7, 5).double()
    outputs = []
    for module in (plain, fused):
        y = x.clone().requires_grad_()
        out = module(y)
        out.square().sum().backward()
        outputs.append((out, y.grad))
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("none", {(8, 6, 1)}),
        ("dense", {(4, 6, 1), (4, 4, 1), (8, 4, 1), (8, 14, 1)}),
        ("ppm", {(8, 6, 1), (8, 38, 3)}),
        ("aspp", {(8, 6, 1), (8, 6, 3), (8, 40, 3)}),
        ("rcca", {(8, 6, 3), (1, 8, 1), (8, 8, 1), (8, 8, 3), (8, 14, 3)}),
    ],
)
def test_kernels_are_those_of_the_papers(name, kernels):
    found = {(*m.weight.shape[:2], m.weight.shape[2]) for m in make(name).modules()
             if isinstance(m, nn.Conv2d)}  # fmt: skip
    assert found == kernels


def test_recurrent_criss_cross_against_its_formula():
    module = make("rcca")
    x = torch.randn(2, 6, 5, 7).double()
    context = module.after(module.attention(module.attention(module.before(x))))
    expected = module.conv_bn(torch.cat([x, context], 1))
    assert torch.allclose(module(x), expected, atol=1e-10)


def test_dense_attention_against_its_formula():
    module = make("dense")
    x = torch.randn(1, 6, 4, 5).double()
    block = module.attention
    query, key = block.f_query(x).flatten(2), block.f_key(x).flatten(2)
    affinity = (query.transpose(1, 2) @ key / 2).softmax(-1)  # sqrt(4 channels)
    context = (block.f_value(x).flatten(2) @ affinity.transpose(1, 2)).view(1, 4, 4, 5)
    expected = module.conv_bn(torch.cat([x, block.W(context)], 1))
    assert torch.allclose(module(x), expected, atol=1e-10)


def test_pyramid_pooling_against_its_formula():
    module = make("ppm")
    x = torch.randn(2, 6, 13, 18).double()
    parts = [x]
    for size, branch in zip((1, 2, 3, 6), module.branches, strict=True):
        pooled = branch[1:](F.adaptive_avg_pool2d(x, size))
        parts.append(F.interpolate(pooled, (13, 18), mode="bilinear", align_corners=False))
    assert torch.allclose(module(x), module.conv_bn(torch.cat(parts, 1)), atol=1e-10)


def test_atrous_pyramid_against_its_formula():
    module = make("aspp")
    x = torch.randn(1, 6, 40, 44).double()
    parts = [module.image_pool(x).expand(-1, -1, 40, 44)]
    for dilation, (conv, *rest) in zip((1, 12, 24, 36), module.branches, strict=True):
        padding = 0 if dilation == 1 else dilation
        part = F.conv2d(x, conv.weight, padding=padding, dilation=dilation)
        for layer in rest:
            part = layer(part)
        parts.append(part)
    assert torch.allclose(module(x), module.conv_bn(torch.cat(parts, 1)), atol=1e-10)


@pytest.mark.parametrize("context", Context.__args__)
def test_every_context_has_the_slope_of_the_head(context):
    network = ISANet(3, "resnet18", last_stage=1, context=context, key_channels=8,
                     value_channels=8, out_channels=8, negative_slope=0.01)  # fmt: skip
    slopes = [m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)]
    assert len(slopes) >= 2
    assert set(slopes) == {0.01}
    assert not any(isinstance(m, nn.ReLU) for m in network.context.modules())


@pytest.mark.parametrize("option", ["value_bias", "context_first"])
@pytest.mark.parametrize("form", ["direct", "reduced"])
def test_an_option_of_isa_is_refused_elsewhere_but_at_its_default(form, option):
    default = form == "reduced"
    options = {"form": form, "context": "dense", "key_channels": 8, "out_channels": 8}
    # As a checkpoint has it, which leaves no default open.
    ISANet(3, "resnet18", last_stage=1, **options, **{option: default})
    with pytest.raises(ValueError, match=f"{option} is of ISA alone: .* with context dense"):
        ISANet(3, "resnet18", last_stage=1, **options, **{option: not default})


@pytest.mark.parametrize("form", ["direct", "reduced"])
@pytest.mark.parametrize("context", Context.__args__)
def test_every_context_trains_in_both_forms(context, form):
    network = ISANet(3, "resnet18", last_stage=2, form=form, context=context, key_channels=8,
                     value_channels=16, out_channels=16, down_factors=((2, 2),))  # fmt: skip
    outputs = network(torch.randn(2, 3, 64, 48))
    sum(out.square().mean() for out in outputs.values()).backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None]
    assert not unused
    assert outputs["out"].shape == (2, 3, 64, 48)
