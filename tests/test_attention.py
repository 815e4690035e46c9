"""The attention against a slow reference in loops, and the promises of its modules."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isanet_pl.models import ISABlock, ISAModule, SelfAttentionBlock2D
from isanet_pl.models.attention import attend
from isanet_pl.models.layers import conv_bn_relu


def randomise(module):
    """Gives every BatchNorm its own scale, shift and statistics; returns the module."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.5)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module


# The reference: one position after the other, one pair of positions after the other.


def slow_conv(conv, x):
    n, _, h, w = x.shape
    out = conv.weight.flatten(1) @ x.flatten(2)
    if conv.bias is not None:
        out = out + conv.bias[:, None]
    return out.view(n, -1, h, w)


def slow_batch_norm(bn, x, statistics):
    """Returns the normalised map; in train mode `statistics` collects the new running ones."""

    def over_channels(vector):
        return vector[:, None, None]

    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        count = x.numel() // x.shape[1]
        mean = x.mean(dim=(0, 2, 3))
        var = ((x - over_channels(mean)) ** 2).mean(dim=(0, 2, 3))
        unbiased = var * count / (count - 1)
        statistics[bn] = (
            0.9 * bn.running_mean + 0.1 * mean.detach(),
            0.9 * bn.running_var + 0.1 * unbiased.detach(),
        )
    x = (x - over_channels(mean)) / over_channels((var + 1e-5).sqrt())
    return x * over_channels(bn.weight) + over_channels(bn.bias)


def slow_layers(layers, x, statistics):
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = slow_conv(layer, x)
        elif isinstance(layer, nn.BatchNorm2d):
            x = slow_batch_norm(layer, x, statistics)
        else:
            x = x * (x > 0)
    return x


def slow_attention(block, x, groups, hidden, statistics):
    """Self-attention of position (y, x) to the positions `groups[y, x]` that are not hidden."""
    query = slow_layers(block.f_query, x, statistics)
    key = slow_layers(block.f_key, x, statistics)
    value = slow_conv(block.f_value, x)
    n, _, h, w = x.shape
    rows = []
    for image, i in itertools.product(range(n), itertools.product(range(h), range(w))):
        q = query[image, :, i[0], i[1]]
        seen = [j for j in groups[i] if j not in hidden]
        scores = [q.dot(key[image, :, j[0], j[1]]) / math.sqrt(len(q)) for j in seen]
        if not seen:  # nothing but padding: the same weight for all of it
            seen, scores = groups[i], [q.new_zeros(())] * len(groups[i])
        weights = torch.stack(scores).exp()
        weights = weights / weights.sum()
        values = torch.stack([value[image, :, j[0], j[1]] for j in seen])
        rows.append(weights @ values)
    context = torch.stack(rows).view(n, h, w, -1).permute(0, 3, 1, 2)
    return slow_layers(block.W, context, statistics)


def slow_isa(block, x, down_factor, value_bias=False, order="long_short", mask_padding=False):
    """Returns what an ISA block of these arguments should, and its new running statistics.

    Of the block itself only the weights are used.
    """
    _, _, height, width = x.shape
    dh, dw = down_factor
    full_h, full_w = -(-height // dh) * dh, -(-width // dw) * dw
    top, left = (full_h - height) // 2, (full_w - width) // 2  # the odd one: bottom, right
    x = F.pad(x, (left, full_w - width - left, top, full_h - height - top))

    def place(i):  # inside the window
        return i[0] % dh, i[1] % dw

    def window(i):
        return i[0] // dh, i[1] // dw

    positions = list(itertools.product(range(full_h), range(full_w)))
    hidden = set()
    if mask_padding:
        real = itertools.product(range(top, top + height), range(left, left + width))
        hidden = set(positions) - set(real)
    statistics = {}
    for name in order.split("_"):
        same = place if name == "long" else window
        groups = {i: [j for j in positions if same(j) == same(i)] for i in positions}
        sa = block.get_submodule(f"{name}_range_sa")
        assert (sa.f_value.bias is not None) == value_bias
        x = slow_attention(sa, x, groups, hidden, statistics)
    return x[:, :, top : top + height, left : left + width], statistics


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def check(module, reference, x):
    """Compares outputs, gradients and running statistics with those of `reference(x)`."""
    variables = [x.requires_grad_(), *module.parameters()]
    expected, statistics = reference(x)
    weight = torch.randn_like(expected)  # so that every output has its own gradient
    expected_gradients = torch.autograd.grad((expected * weight).sum(), variables)

    actual = module(x)
    assert_same(actual, expected)
    gradients = torch.autograd.grad((actual * weight).sum(), variables)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_same(gradient, expected_gradient)
    num_norms = sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert len(statistics) == (num_norms if module.training else 0)
    for bn, (mean, var) in statistics.items():
        assert_same(bn.running_mean, mean)
        assert_same(bn.running_var, var)


def check_block(size, training, **arguments):
    block = randomise(ISABlock(3, 4, 5, 6, **arguments).double()).train(training)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    check(block, lambda x: slow_isa(block, x, **arguments), x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask_padding", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("value_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((4, 6), (2, 3)),  # nothing to pad, 4 windows of 6 places
        ((4, 4), (2, 2)),  # as many windows as places: mixing them up keeps the shapes
        ((5, 4), (2, 2)),  # padding at the bottom only
        ((2, 4), (2, 3)),  # two columns of padding, one on each side
        ((3, 4), (2, 3)),  # both
        ((3, 6), (4, 4)),  # one row, two columns
        ((1, 1), (4, 4)),  # less than one window
        ((1, 5), (4, 4)),  # rows 1 + 2, columns 1 + 2
    ],
)
def test_block_equals_slow_reference(size, window, value_bias, mask_padding, training):
    check_block(
        size, training, down_factor=window, value_bias=value_bias, mask_padding=mask_padding
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask_padding", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("size", "window"), [((4, 4), (2, 2)), ((3, 4), (2, 3))])
@pytest.mark.parametrize("order", ["short_long", "long", "short"])
def test_other_orders_equal_slow_reference(order, size, window, mask_padding, training):
    check_block(
        size,
        training,
        down_factor=window,
        value_bias=True,
        order=order,
        mask_padding=mask_padding,
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dense_attention_equals_slow_reference(training):
    block = randomise(SelfAttentionBlock2D(3, 4, 5).double()).train(training)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    everywhere = list(itertools.product(range(2), range(3)))
    expected = slow_attention(block, x, dict.fromkeys(everywhere, everywhere), set(), {})
    assert expected.shape == x.shape  # out_channels is in_channels where it is not given
    assert_same(block(x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("order", "window"), [("long", (1, 1)), ("short", (5, 7))])
def test_one_stage_over_the_whole_map_is_dense_attention(order, window, training):
    dense = randomise(SelfAttentionBlock2D(3, 4, 5, 6).double()).train(training)
    isa = ISABlock(3, 4, 5, 6, window, order=order).double().train(training)
    isa.get_submodule(f"{order}_range_sa").load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert_same(isa(x), dense(x))


def test_what_the_backward_pass_computes_again_leaves_the_state_alone():
    block = ISABlock(3, 4, 5, 6, (2, 3))
    names, seen = block.state_dict().keys(), []
    for norm in (part for part in block.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.register_forward_hook(lambda *_: seen.append(block.state_dict()))
    out = block(torch.randn(2, 3, 5, 7))
    before = {name: value.clone() for name, value in block.state_dict().items()}
    forward = len(seen)
    out.sum().backward()
    assert len(seen) > forward
    # Complete at any moment: a signal may ask for a checkpoint.
    assert all(state.keys() == names for state in seen)
    for name, value in block.state_dict().items():
        assert value.equal(before[name]), name
        assert not name.endswith("num_batches_tracked") or value == 1


# Who sees whom.


def seen_from_everywhere(block, height, width):
    """Returns a bool (H, W, H, W): the output at [y, x] depends on the input at [:, :].

    In eval mode, as the batch statistics of train mode connect everything.
    """
    places = torch.arange(height * width)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    x = x.repeat(len(places), 1, 1, 1).requires_grad_()  # one copy for each output position
    block(x)[places, :, places // width, places % width].sum().backward()
    return (x.grad.abs().sum(dim=1) > 0).view(height, width, height, width)


@pytest.mark.parametrize("order", ["long_short", "short_long"])
@pytest.mark.parametrize("size", [(6, 9), (5, 7)])
def test_two_stages_connect_every_pair_of_positions(order, size):
    block = randomise(ISABlock(3, 4, 5, 6, (2, 3), order=order)).double().eval()
    assert seen_from_everywhere(block, *size).all()


@pytest.mark.parametrize("order", ["long", "short"])
def test_one_stage_connects_exactly_its_group(order):
    block = randomise(ISABlock(3, 4, 5, 6, (2, 3), order=order)).double().eval()
    seen = seen_from_everywhere(block, 6, 9)
    for y, x in itertools.product(range(6), range(9)):
        expected = torch.zeros(6, 9, dtype=torch.bool)
        if order == "long":
            expected[y % 2 :: 2, x % 3 :: 3] = True
        else:
            expected[y - y % 2 : y - y % 2 + 2, x - x % 3 : x - x % 3 + 3] = True
        assert seen[y, x].equal(expected), (y, x)


# The module.


def make_module(**arguments):
    return randomise(ISAModule(6, 4, 5, 8, **arguments))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("windows", [[(2, 2)], [(2, 2), (3, 1)], [(1, 4), (2, 2), (3, 1)]])
@pytest.mark.parametrize(
    ("context_first", "arguments"),
    [
        (False, {}),
        (True, {"value_bias": True, "order": "short_long", "mask_padding": True}),
    ],
)
def test_module_equals_slow_blocks_beside_the_input(windows, context_first, arguments, training):
    module = randomise(
        ISAModule(3, 2, 3, 4, windows, context_first=context_first, **arguments).double()
    ).train(training)

    def reference(x):
        parts, statistics = [x], {}
        if len(windows) > 1:
            parts = [slow_layers(module.up_conv, x, statistics)]
        for stage, window in zip(module.stages, windows, strict=True):
            context, of_stage = slow_isa(stage, x, window, **arguments)
            statistics.update(of_stage)
            parts.append(context)
        if context_first:
            parts = [*parts[1:], parts[0]]
        return slow_layers(module.conv_bn, torch.cat(parts, dim=1), statistics), statistics

    check(module, reference, torch.randn(1, 3, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize(("windows", "own"), [([(2, 2)], 6), ([(2, 2), (3, 1)], 16)])
def test_context_first_is_a_permutation_of_the_last_conv(windows, own):
    module = make_module(down_factors=windows).eval()
    other = make_module(down_factors=windows, context_first=True).eval()
    state = module.state_dict()
    x = torch.randn(2, 6, 5, 7)
    other.load_state_dict(state)
    assert not torch.allclose(other(x), module(x), atol=1e-2)
    weight = state["conv_bn.0.weight"]
    state["conv_bn.0.weight"] = torch.cat([weight[:, own:], weight[:, :own]], dim=1)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), module(x))


def test_dropout_drops_whole_channels_in_train_mode_only():
    plain, dropping = make_module(), make_module(dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6, 5, 7)
    full, dropped = plain(x), dropping(x)
    kept = dropped.flatten(2).any(dim=2)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * full[kept])
    assert full[~kept].any()
    assert plain.eval()(x).equal(dropping.eval()(x))


BN = ("weight", "bias", "running_mean", "running_var")
SELF_ATTENTION_KEYS = {
    *(f"f_{name}.{i}.weight" for name in ("key", "query") for i in (0, 3)),
    *(f"f_{name}.{i}.{part}" for name in ("key", "query") for i in (1, 4) for part in BN),
    "f_value.weight",
    "W.0.weight",
    *(f"W.1.{part}" for part in BN),
}
BLOCK_KEYS = {f"{name}_range_sa.{k}" for name in ("long", "short") for k in SELF_ATTENTION_KEYS}
CONV_BN_KEYS = {"conv_bn.0.weight", *(f"conv_bn.1.{part}" for part in BN)}
UP_CONV_KEYS = {"up_conv.0.weight", *(f"up_conv.1.{part}" for part in BN)}


def names(module):
    return {k for k in module.state_dict() if not k.endswith("num_batches_tracked")}


def test_state_dict_names_are_those_of_the_reference_code():
    assert names(SelfAttentionBlock2D(6, 4, 5)) == SELF_ATTENTION_KEYS
    assert names(ISABlock(6, 4, 5, 8)) == BLOCK_KEYS
    first = {f"stages.0.{k}" for k in BLOCK_KEYS}
    assert names(make_module()) == first | CONV_BN_KEYS
    second = {f"stages.1.{k}" for k in BLOCK_KEYS}
    two = make_module(down_factors=[(2, 2), (4, 4)])
    assert names(two) == first | second | CONV_BN_KEYS | UP_CONV_KEYS
    with_bias = ISABlock(6, 4, 5, 8, value_bias=True)
    biases = {f"{name}_range_sa.f_value.bias" for name in ("long", "short")}
    assert names(with_bias) == BLOCK_KEYS | biases


def test_weight_shapes():
    module = make_module(down_factors=[(2, 2), (4, 4)])
    assert module.up_conv[0].weight.shape == (16, 6, 1, 1)  # to as many as the blocks return
    assert module.conv_bn[0].weight.shape == (8, 32, 1, 1)
    long, short = module.stages[0].long_range_sa, module.stages[0].short_range_sa
    assert long.f_key[0].weight.shape == (4, 6, 1, 1)
    assert long.f_query[3].weight.shape == (4, 4, 1, 1)
    assert long.f_value.weight.shape == (5, 6, 1, 1)
    assert long.W[0].weight.shape == (8, 5, 1, 1)
    assert short.f_value.weight.shape == (5, 8, 1, 1)


@pytest.mark.parametrize("height", [1, 2, 7, 8, 9, 17])
def test_any_size_goes_in_and_comes_out(height):
    module = make_module(down_factors=[(8, 8), (3, 5)]).eval()
    for width in (1, 3, 8, 16, 19):
        assert module(torch.randn(1, 6, height, width)).shape == (1, 8, height, width)


def test_several_losses_may_go_back_through_a_block():
    gradients, statistics = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        module = ISAModule(8, 4, 4, 8, [(2, 2)], recompute=recompute)
        out = module(torch.randn(2, 8, 4, 4))
        out.mean().backward(retain_graph=True)
        out.square().mean().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
        statistics.append(list(module.buffers()))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(statistics[0], statistics[1])


def test_conv_bn_relu_keeps_the_size():
    layers = conv_bn_relu(3, 4, kernel_size=3)
    out = layers(torch.randn(2, 3, 5, 6))
    assert out.shape == (2, 4, 5, 6)
    assert out.min() == 0
    assert layers[0].bias is None


@pytest.mark.parametrize("window", [(0, 8), (8, 0), (-1, 2)])
def test_window_below_one_is_refused(window):
    with pytest.raises(ValueError, match=r"down_factor must be two integers >= 1, got \("):
        ISABlock(3, 4, 5, 6, down_factor=window)


def test_no_window_is_refused():
    with pytest.raises(ValueError, match="down_factors must name at least one window"):
        ISAModule(3, 4, 5, 6, down_factors=[])


@pytest.mark.parametrize("order", ["long_short", "short_long", "long", "short"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_every_parameter_gets_a_finite_gradient(order, mask_padding):
    module = make_module(
        down_factors=[(2, 2), (4, 3)], value_bias=True, order=order, mask_padding=mask_padding
    )
    module(torch.randn(2, 6, 5, 7)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_eval_is_deterministic_and_changes_nothing():
    module = make_module(dropout=0.5).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(2, 6, 9, 10)
    original = x.clone()
    assert module(x).equal(module(x))
    assert x.equal(original)  # the ReLUs work in place
    assert all(v.equal(before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("how", ["module", "autocast"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_bfloat16_agrees_within_rounding(how, mask_padding):
    module = randomise(ISAModule(32, 16, 32, 32, [(4, 4)], mask_padding=mask_padding)).eval()
    x = torch.randn(2, 32, 13, 18)
    with torch.no_grad():
        expected = module(x)
        if how == "module":
            actual = module.bfloat16()(x.bfloat16())
        else:
            with torch.autocast("cpu", torch.bfloat16):
                actual = module(x)
    assert actual.isfinite().all()
    # One rounding to bf16's 8 bits is at most 2^-8 of a value and 0.4 of that on average. The
    # longest way through the module has about 22 of them (2 stages of 2 convs, 2 norms, scores,
    # softmax, context, conv, norm; then conv, norm; input, weights); independent ones add up to
    # sqrt(22) times one.
    rounding = math.sqrt(22) * 2**-8
    error = actual.float() - expected
    assert error.square().mean().sqrt() < 0.4 * rounding * expected.square().mean().sqrt()
    assert error.abs().max() < rounding * expected.abs().max()


# Mixed precision


def test_a_bias_of_the_value_stays_in_the_type_of_autocast(monkeypatch):
    block = ISABlock(16, 8, 16, 16, value_bias=True).train()
    seen = []
    for stage in (block.long_range_sa, block.short_range_sa):
        project = stage._attend_and_project
        monkeypatch.setattr(
            stage,
            "_attend_and_project",
            lambda *a, project=project: (seen.append([t.dtype for t in a[:3]]), project(*a))[1],
        )
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 16, 16, 16)).sum().backward()
    assert len(seen) >= 2  # and once more where it is computed again
    assert all(dtypes == [torch.bfloat16] * 3 for dtypes in seen)


def test_scores_of_fp32_operands_train_under_autocast():
    query, key, value = (torch.randn(2, 8, 3, 5, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(query, key, value)
    out.float().square().sum().backward()
    gradients = [t.grad.clone() for t in (query, key, value)]
    exact = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    attend(*exact).square().sum().backward()
    for mine, theirs in zip(gradients, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs.grad).norm() < 0.05 * theirs.grad.norm()


def test_a_batch_of_nothing_has_no_context():
    isa = ISAModule(8, 4, 4, 4, down_factors=[(2, 2), (3, 1)]).eval()
    assert isa(torch.randn(0, 8, 5, 6)).shape == (0, 4, 5, 6)
