"""Checkpoints in the layouts of mmsegmentation and openseg.pytorch, and what they compute.

Names, shapes and forward passes are written down from the layouts' descriptions, one tensor at a
time and straight on the state dict, so that nothing here depends on the code that is tested.
"""

import itertools

import torch
import torch.nn.functional as F

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CLASSES = ("wood", "stone", "water")
PALETTE = [[1, 2, 3], [40, 50, 60], [7, 80, 90]]


# The layouts.


def conv(name, c_out, c_in, size=1, bias=False):
    yield f"{name}.weight", (c_out, c_in, size, size)
    if bias:
        yield f"{name}.bias", (c_out,)


def norm(name, width, counter=True):
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)
    if counter:
        yield f"{name}.num_batches_tracked", ()


def residual_layers(depth, c_in, counter):
    for i, blocks in enumerate(BLOCKS[depth]):
        p = 64 * 2**i
        for j in range(blocks):
            block = f"backbone.layer{i + 1}.{j}"
            for k, (c_out, c, size) in enumerate(((p, c_in, 1), (p, p, 3), (4 * p, p, 1)), 1):
                yield from conv(f"{block}.conv{k}", c_out, c, size)
                yield from norm(f"{block}.bn{k}", c_out, counter)
            if j == 0:
                yield from conv(f"{block}.downsample.0", 4 * p, c_in)
                yield from norm(f"{block}.downsample.1", 4 * p, counter)
            c_in = 4 * p


def mmseg_layout(depth=50, num_classes=3, counter=True):
    """Yields name and shape of every tensor of mmsegmentation's ISANet."""
    for number, (c_out, c_in) in ((0, (32, 3)), (3, (32, 32)), (6, (64, 32))):
        yield from conv(f"backbone.stem.{number}", c_out, c_in, 3)
        yield from norm(f"backbone.stem.{number + 1}", c_out, counter)
    yield from residual_layers(depth, 64, counter)
    head = "decode_head"
    yield from conv(f"{head}.conv_seg", num_classes, 512, bias=True)
    yield from conv(f"{head}.in_conv.conv", 512, 2048, 3)
    yield from norm(f"{head}.in_conv.bn", 512, counter)
    for relation in (f"{head}.global_relation", f"{head}.local_relation"):
        for kind, number in itertools.product(("key", "query"), (0, 1)):
            project = f"{relation}.{kind}_project.{number}"
            yield from conv(f"{project}.conv", 256, 256 if number else 512)
            yield from norm(f"{project}.bn", 256, counter)
        yield from conv(f"{relation}.value_project", 512, 512, bias=True)
        yield from conv(f"{relation}.output_project.conv", 512, 512)
        yield from norm(f"{relation}.output_project.bn", 512, counter)
    yield from conv(f"{head}.out_conv.conv", 512, 1024)
    yield from norm(f"{head}.out_conv.bn", 512, counter)
    yield from conv("auxiliary_head.convs.0.conv", 256, 1024, 3)
    yield from norm("auxiliary_head.convs.0.bn", 256, counter)
    yield from conv("auxiliary_head.conv_seg", num_classes, 256, bias=True)


def openseg_layout(depth=50, num_classes=3, inplace=True, bias=False, factors=1):
    """Yields name and shape of every tensor of openseg.pytorch's ISANet."""
    counter, dot = not inplace, "" if inplace else ".0"
    for number, (c_out, c_in) in enumerate(((64, 3), (64, 64), (128, 64)), 1):
        yield from conv(f"backbone.resinit.conv{number}", c_out, c_in, 3)
        yield from norm(f"backbone.resinit.bn{number}", c_out, counter)
    yield from residual_layers(depth, 128, counter)
    yield from conv("isa_head.0", 512, 2048, 3, bias)
    yield from norm(f"isa_head.1{dot}", 512, counter)
    for stage, reach in itertools.product(range(factors), ("long", "short")):
        block = f"isa_head.2.stages.{stage}.{reach}_range_sa"
        for kind in ("f_key", "f_query"):
            yield from conv(f"{block}.{kind}.0", 256, 512)
            yield from norm(f"{block}.{kind}.1{dot}", 256, counter)
            yield from conv(f"{block}.{kind}.2", 256, 256)
            yield from norm(f"{block}.{kind}.3{dot}", 256, counter)
        yield from conv(f"{block}.f_value", 512, 512)
        yield from conv(f"{block}.W.0", 512, 512)
        yield from norm(f"{block}.W.1{dot}", 512, counter)
    if factors > 1:
        yield from conv("isa_head.2.up_conv.0", 512 * factors, 512)
        yield from norm(f"isa_head.2.up_conv.1{dot}", 512 * factors, counter)
    yield from conv("isa_head.2.conv_bn.0", 512, 1024 * factors)
    yield from norm(f"isa_head.2.conv_bn.1{dot}", 512, counter)
    yield from conv("cls_head", num_classes, 512, bias=True)
    yield from conv("dsn_head.0", 512, 1024, 3, bias)
    yield from norm(f"dsn_head.1{dot}", 512, counter)
    yield from conv("dsn_head.3", num_classes, 512, bias=True)


def random_state(layout, seed=0):
    """Returns random tensors that keep activations of a usual size; scales of either sign."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in layout:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(1234)
        elif name.endswith("running_var"):
            value = 0.5 + noise.square()
        elif len(shape) == 4:
            value = noise * (1.5 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name.endswith("weight"):
            value = noise.sign() * (0.6 + 0.1 * noise.abs())
        else:
            value = 0.2 * noise
        state[name] = value
    if "backbone.resinit.conv1.weight" in state:
        state["backbone.resinit.conv1.weight"] /= 50  # its input is not divided by anything
    return state


def empty_state(layout):
    """Returns tensors of the right shapes that take no room in a file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in layout}


# What the networks compute, in float64.


class Reader:
    """Layers by name, straight from a state dict.

    Args:
        state: The tensors.
        inplace: Scales are InPlaceABN's: |weight| + 1e-5.
        slope: Of the head's activations below zero.
    """

    def __init__(self, state, inplace=False, slope=0.0):
        self.state = {name: value.double() for name, value in state.items()}
        self.inplace = inplace
        self.slope = slope

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, name, x):
        weight, bias, mean, var = (
            self.state[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight.abs() + 1e-5 if self.inplace else weight
        return (x - mean) / (var + 1e-5).sqrt() * scale + bias

    def layer(self, conv_name, norm_name, x, **options):
        """Conv, norm and activation of the head."""
        x = self.norm(norm_name, self.conv(conv_name, x, **options))
        return torch.where(x > 0, x, self.slope * x)

    def residual_layers(self, x):
        """Returns the maps of layers 3 and 4."""
        maps = []
        for i in range(1, 5):
            blocks = {name.split(".")[2] for name in self.state if f"backbone.layer{i}." in name}
            for j in range(len(blocks)):
                # The first block of a dilated layer has the dilation of the layer before.
                dilation = {3: 2 if j else 1, 4: 4 if j else 2}.get(i, 1)
                x = self.block(f"backbone.layer{i}.{j}", x, 2 if (i, j) == (2, 0) else 1, dilation)
            maps.append(x)
        return maps[2], maps[3]

    def block(self, name, x, stride, dilation):
        y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
        y = self.conv(f"{name}.conv2", y, stride=stride, padding=dilation, dilation=dilation)
        y = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", self.norm(f"{name}.bn2", y).relu()))
        if f"{name}.downsample.0.weight" in self.state:
            x = self.conv(f"{name}.downsample.0", x, stride=stride)
            x = self.norm(f"{name}.downsample.1", x)
        return (x + y).relu()

    def attend(self, query, key, value):
        """All positions of a map to all."""
        n, c, h, w = value.shape
        scores = torch.einsum("ncp,ncq->npq", query.flatten(2), key.flatten(2))
        weights = (scores / query.shape[1] ** 0.5).softmax(dim=2)
        return torch.einsum("npq,ncq->ncp", weights, value.flatten(2)).view(n, c, h, w)


def interlaced(x, factor, long_range, short_range):
    """Pads, attends from one position of every window to the next, then within each window."""
    h, w = x.shape[2:]
    down, right = -h % factor, -w % factor
    top, left = down // 2, right // 2
    x = F.pad(x, (left, right - left, top, down - top))
    result = torch.zeros_like(x)
    for i, j in itertools.product(range(factor), range(factor)):
        result[:, :, i::factor, j::factor] = long_range(x[:, :, i::factor, j::factor])
    x, result = result, torch.zeros_like(x)
    for i, j in itertools.product(range(0, x.shape[2], factor), range(0, x.shape[3], factor)):
        window = (..., slice(i, i + factor), slice(j, j + factor))
        result[window] = short_range(x[window])
    return result[:, :, top : top + h, left : left + w]


def run_mmseg(state, x, corners):
    """Returns the main and the auxiliary logits of mmsegmentation's network for its input."""
    net = Reader(state)
    size = x.shape[2:]
    for number, stride in ((0, 2), (3, 1), (6, 1)):
        x = net.conv(f"backbone.stem.{number}", x, stride=stride, padding=1)
        x = net.norm(f"backbone.stem.{number + 1}", x).relu()
    before, last = net.residual_layers(F.max_pool2d(x, 3, 2, 1))

    def relation(name):
        def run(x):
            query, key = (
                net.layer(f"{p}.1.conv", f"{p}.1.bn", net.layer(f"{p}.0.conv", f"{p}.0.bn", x))
                for p in (f"decode_head.{name}.query_project", f"decode_head.{name}.key_project")
            )
            x = net.attend(query, key, net.conv(f"decode_head.{name}.value_project", x))
            project = f"decode_head.{name}.output_project"
            return net.layer(f"{project}.conv", f"{project}.bn", x)

        return run

    x = net.layer("decode_head.in_conv.conv", "decode_head.in_conv.bn", last, padding=1)
    context = interlaced(x, 8, relation("global_relation"), relation("local_relation"))
    x = torch.cat([context, x], dim=1)
    x = net.layer("decode_head.out_conv.conv", "decode_head.out_conv.bn", x)
    out = net.conv("decode_head.conv_seg", x)
    aux = "auxiliary_head.convs.0"
    aux = net.conv(
        "auxiliary_head.conv_seg", net.layer(f"{aux}.conv", f"{aux}.bn", before, padding=1)
    )
    return [F.interpolate(t, size, mode="bilinear", align_corners=corners) for t in (out, aux)]


def run_openseg(state, image, inplace, factors=(8,)):
    """Returns the main and the auxiliary logits of the authors' network for RGB in 0..255."""
    net = Reader(state, inplace, 0.01 if inplace else 0.0)
    dot = "" if inplace else ".0"
    size = image.shape[2:]
    mean = torch.tensor([102.9801, 115.9465, 122.7717], dtype=torch.float64)
    x = image[:, [2, 1, 0]].double() - mean.view(3, 1, 1)  # BGR
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = net.conv(f"backbone.resinit.conv{number}", x, stride=stride, padding=1)
        x = net.norm(f"backbone.resinit.bn{number}", x).relu()
    before, last = net.residual_layers(F.max_pool2d(x, 3, 2, 1, ceil_mode=True))

    def attention(name):
        def run(x):
            query, key = (
                net.layer(f"{p}.2", f"{p}.3{dot}", net.layer(f"{p}.0", f"{p}.1{dot}", x))
                for p in (f"{name}.f_query", f"{name}.f_key")
            )
            x = net.attend(query, key, net.conv(f"{name}.f_value", x))
            return net.layer(f"{name}.W.0", f"{name}.W.1{dot}", x)

        return run

    x = net.layer("isa_head.0", f"isa_head.1{dot}", last, padding=1)
    contexts = []
    for stage, factor in enumerate(factors):
        name = f"isa_head.2.stages.{stage}"
        reaches = (attention(f"{name}.{reach}_range_sa") for reach in ("long", "short"))
        contexts.append(interlaced(x, factor, *reaches))
    if len(factors) > 1:
        x = net.layer("isa_head.2.up_conv.0", f"isa_head.2.up_conv.1{dot}", x)
    x = torch.cat([x, *contexts], dim=1)
    x = net.layer("isa_head.2.conv_bn.0", f"isa_head.2.conv_bn.1{dot}", x)
    out = net.conv("cls_head", x)
    aux = net.conv("dsn_head.3", net.layer("dsn_head.0", f"dsn_head.1{dot}", before, padding=1))
    return [F.interpolate(t, size, mode="bilinear", align_corners=True) for t in (out, aux)]


# What else is in the files.

MMSEG_CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(
        type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
        norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False, style='pytorch',
        contract_dilation=True),
    decode_head=dict(
        type='ISAHead', in_channels=2048, in_index=3, channels=512, isa_channels=256,
        down_factor=(8, 8), dropout_ratio=0.1, num_classes=3, align_corners=CORNERS,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(TEST))
"""
PIPELINE_0 = """
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(2049, 1025), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip')])
]
data = dict(samples_per_gpu=2, workers_per_gpu=2)
log_level = 'INFO'
"""
PIPELINE_1 = """
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(2048, 512), type='Resize'),
    dict(type='PackSegInputs')
]
test_cfg = dict(type='TestLoop')
"""
SLIDE = "mode='slide', crop_size=(769, 769), stride=(513, 513)"


def mmseg_config(corners=False, test="mode='whole'", rest=PIPELINE_0):
    """Returns the text of a config as mmsegmentation keeps it."""
    return MMSEG_CONFIG.replace("CORNERS", str(corners)).replace("TEST", test) + rest


def mmseg_file(state, config=None, **meta):
    """Returns what a checkpoint of v0.x holds."""
    if config is not None:
        meta["config"] = config
    meta = {"env_info": "sys.platform: linux", "seed": 0, "epoch": 9, "iter": 80000, **meta}
    return {"meta": {"CLASSES": CLASSES, "PALETTE": PALETTE, **meta}, "state_dict": state}
