"""The conv that trains faster, and the sum in place of a concatenation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_attention import randomise
from torch import nn

from isanet_pl.models import layers
from isanet_pl.models.layers import SameConv, _Conv, conv_bn_relu, is_same_conv, mix


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "dilation", "dtype", "tolerance"),
    [
        (3, 1, torch.float32, 1e-5),
        (3, 3, torch.float32, 1e-5),
        (3, 2, torch.bfloat16, 0.02),
        (1, 1, torch.bfloat16, 0.02),
    ],
)
def test_conv_has_the_gradients_of_a_conv(layout, size, dilation, dtype, tolerance):
    conv = SameConv(5, 7, size, dilation).to(memory_format=layout, dtype=dtype)
    x = torch.randn(2, 5, 9, 11, dtype=dtype).contiguous(memory_format=layout)
    target = torch.randn(2, 7, 9, 11, dtype=dtype)
    padding = dilation * (size // 2)
    results = []
    for run in (
        conv,
        lambda y: F.conv2d(y, conv.weight, padding=padding, dilation=dilation),
    ):
        y = x.clone().requires_grad_()
        conv.weight.grad = None
        out = run(y)
        (out * target).sum().backward()
        results.append((out, y.grad, conv.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.allclose(
            mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item()
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 3])
def test_many_channels_are_taken_by_parts_with_the_same_result(layout, size, monkeypatch):
    monkeypatch.setattr(layers, "_FORWARD_CHANNELS", 3)
    monkeypatch.setattr(layers, "_WEIGHT_BYTES", {size: 32})  # 4 channels in fp64
    padding = 2 * (size // 2)
    conv = SameConv(10, 7, size, 2).double().to(memory_format=layout)
    conv.bias = nn.Parameter(torch.randn(7).double())
    x = torch.randn(2, 10, 6, 5).double().contiguous(memory_format=layout).requires_grad_()
    target = torch.randn(2, 7, 6, 5).double()
    for bias in (conv.bias, None):
        conv.bias = bias
        gradients = []
        outs = conv(x), F.conv2d(x, conv.weight, bias, padding=padding, dilation=2)
        for out in outs:
            gradients.append(torch.autograd.grad((out * target).sum(), (x, conv.weight)))
        assert torch.allclose(*outs, atol=1e-12)
        for mine, theirs in zip(*gradients, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_its_own_gradient_formula_in_double_precision(size):
    x = torch.randn(2, 2, 5, 4).double().requires_grad_()
    weight = torch.randn(3, 2, size, size).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _Conv.apply(a, b, 1), (x, weight))


@pytest.mark.parametrize("size", [1, 3])
def test_only_what_is_asked_for_is_computed(size):
    dtype = torch.bfloat16 if size == 1 else torch.float32
    conv = SameConv(2, 3, size).to(dtype)
    conv(torch.randn(1, 2, 4, 4, dtype=dtype)).sum().backward()  # the input needs none
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    x = torch.randn(1, 2, 4, 4, dtype=dtype, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None


def used(conv, x):
    return "_Conv" in type(conv(x).grad_fn).__name__


@pytest.mark.parametrize("size", [1, 3])
def test_it_is_used_where_a_gradient_is_wanted(size):
    conv, x = SameConv(2, 3, size), torch.randn(1, 2, 4, 4)
    assert used(conv, x)
    assert used(conv.bfloat16(), x.bfloat16())
    conv = conv.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert used(conv, x)


def test_without_a_gradient_it_is_an_ordinary_conv(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(_Conv, "apply", refuse)
    conv, x = SameConv(2, 3, 1), torch.randn(1, 2, 4, 4)
    with pytest.raises(AssertionError):
        conv(x)
    with torch.no_grad():
        conv(x)
    layers.same_conv(x, conv.weight, bias=torch.zeros(3))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    conv(x)


def test_under_autocast_its_gradients_are_those_of_a_conv():
    x = torch.randn(2, 8, 5, 4, requires_grad=True)
    conv = SameConv(8, 6, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        (out.float() ** 2).sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad.dtype == conv.weight.grad.dtype == torch.float32
    mine = x.grad, conv.weight.grad
    x.grad = conv.weight.grad = None
    (F.conv2d(x, conv.weight) ** 2).sum().backward()
    for half, full in zip(mine, (x.grad, conv.weight.grad), strict=True):
        assert torch.allclose(half, full, atol=0.02 * full.abs().max().item())


@pytest.mark.parametrize(
    ("fits", "options"),
    [
        (True, {"kernel_size": 1}),
        (True, {"kernel_size": 3, "padding": 1}),
        (True, {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False}),
        (False, {"kernel_size": 1, "stride": 2}),
        (False, {"kernel_size": 3, "padding": 1, "stride": (1, 2)}),
        (False, {"kernel_size": 3}),
        (False, {"kernel_size": 3, "padding": 1, "dilation": 2}),
        (False, {"kernel_size": 1, "padding": 1}),
        (False, {"kernel_size": 3, "padding": 1, "groups": 2}),
        (False, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
        (False, {"kernel_size": (1, 3), "padding": (0, 1)}),
        (False, {"kernel_size": 7, "padding": 3}),
    ],
)
def test_other_convs_are_told_apart(fits, options):
    conv = nn.Conv2d(4, 6, **options)
    assert is_same_conv(conv) == fits
    if fits:
        x = torch.randn(2, 4, 7, 9)
        expected = conv(x)
        conv.__class__ = SameConv
        assert torch.allclose(conv(x), expected)


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


def test_a_second_derivative_is_refused_by_name():
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    out = SameConv(4, 4, 1)(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
