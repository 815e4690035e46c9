"""The conv that trains faster, and the sum in place of a concatenation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_attention import randomise
from torch import nn

from isanet_pl.models.layers import Conv3x3, _Conv, conv_bn_relu, mix


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dilation", [1, 3])
def test_conv_has_the_gradients_of_a_conv(layout, dilation):
    conv = Conv3x3(5, 7, dilation).to(memory_format=layout)
    x = torch.randn(2, 5, 9, 11).contiguous(memory_format=layout)
    target = torch.randn(2, 7, 9, 11)
    results = []
    for run in (
        conv,
        lambda y: F.conv2d(y, conv.weight, padding=dilation, dilation=dilation),
    ):
        y = x.clone().requires_grad_()
        conv.weight.grad = None
        out = run(y)
        (out * target).sum().backward()
        results.append((out, y.grad, conv.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_its_own_gradient_formula_in_double_precision():
    x = torch.randn(1, 2, 5, 4).double().requires_grad_()
    weight = torch.randn(3, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _Conv.apply(a, b, 1, 1), (x, weight))


def test_only_what_is_asked_for_is_computed():
    conv = Conv3x3(2, 3)
    conv(torch.randn(1, 2, 4, 4)).sum().backward()  # the input needs none
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None


def used(conv, x):
    return "_Conv" in type(conv(x).grad_fn).__name__


def test_it_is_used_where_it_pays_and_nowhere_else():
    conv, x = Conv3x3(2, 3), torch.randn(1, 2, 4, 4)
    assert used(conv, x)
    assert not used(conv.double(), x.double())
    conv = conv.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(conv, x)
    with torch.no_grad():
        assert conv(x).grad_fn is None


def test_conv_bn_relu_keeps_its_names():
    for size in (1, 3):
        layers = conv_bn_relu(4, 6, size)
        assert [name for name, _ in layers.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
        assert layers(torch.randn(2, 4, 5, 7)).shape == (2, 6, 5, 7)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_mix_is_the_conv_of_the_concatenation(size, bias, train):
    layers = randomise(conv_bn_relu(9, 6, size)).double().train(train)
    if bias:
        layers[0].bias = nn.Parameter(torch.randn(6).double())
    other = copy.deepcopy(layers)
    parts = [torch.randn(2, channels, 5, 7).double() for channels in (4, 2, 3)]
    assert torch.allclose(mix(layers, parts), other(torch.cat(parts, 1)), atol=1e-10)
