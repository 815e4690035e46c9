"""Whole, sliding and averaged inference, against plain formulations."""

import itertools
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isanet_pl.callbacks.summary import gmacs_of_parts
from isanet_pl.inference import Inference, window_starts
from isanet_pl.models import ISANet
from isanet_pl.models.isanet import Context, Form


class Pointwise:
    """A network whose answer at a pixel depends on that pixel alone."""

    align_corners = False
    output_stride = 1

    def __init__(self, num_classes=3):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(num_classes, 3, 1, 1, generator=generator)
        self.sizes = []

    def normalise(self, image):
        return image.float() / 255

    def __call__(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return {"out": F.conv2d(x, self.weight)}


class Recording(Pointwise):
    """A network that gives its own number to every pixel of its n-th call."""

    def __call__(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        n, _, h, w = x.shape
        return {"out": torch.full((n, 2, h, w), float(len(self.sizes)))}


def noise(*size, count=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def isanet():
    torch.manual_seed(0)
    network = ISANet(
        4, "resnet18", form="reduced", key_channels=8, value_channels=8, out_channels=8,
        down_factors=((2, 2),), last_stage=2,
    )  # fmt: skip
    torch.nn.init.normal_(network.classifier.weight)
    # Random statistics, so that nothing is near zero by accident.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return network.eval()


# Windows


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 120), st.data())
def test_windows_cover_the_axis_and_stay_inside(length, crop, data):
    stride = data.draw(st.integers(1, crop))
    starts = window_starts(length, crop, stride)
    covered = set()
    for start in starts:
        assert start == 0 or start + crop <= length
        covered |= set(range(start, min(start + crop, length)))
    assert covered == set(range(length))
    assert starts == sorted(set(starts))  # none twice
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))
    assert len(starts) == max(0, -(-(length - crop) // stride)) + 1  # mmsegmentation's count


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.data(),
)
def test_sliding_does_not_change_what_a_pixelwise_network_says(size, crop, data):
    stride = tuple(data.draw(st.integers(1, c)) for c in crop)
    image = noise(*size)
    whole = Inference()(Pointwise(), image)
    slid = Inference(mode="slide", crop_size=crop, stride=stride)(Pointwise(), image)
    assert torch.allclose(slid, whole, atol=1e-5)


def test_overlaps_are_averaged_and_the_last_window_is_shifted_back():
    network = Recording()
    inference = Inference(mode="slide", crop_size=(4, 4), stride=(4, 3))
    found = inference(network, noise(4, 9))[0, 0, 0]
    # Windows at 0, 3 and, shifted back from 6, 5.
    assert found.tolist() == [1, 1, 1, 1.5, 2, 2.5, 2.5, 3, 3]
    assert network.sizes == [(4, 4)] * 3


def test_windows_larger_than_the_image_see_it_whole(isanet):
    image = noise(33, 50)  # no multiple of the stride: features lie on its grid in windows too
    wholes = [Inference(pad_multiple=multiple)(isanet, image) for multiple in (None, 1)]
    assert not torch.allclose(*wholes)
    for multiple, whole in zip((None, 1), wholes, strict=True):
        for crop in ((33, 50), (64, 64), (33, 200)):
            slide = Inference(mode="slide", crop_size=crop, pad_multiple=multiple)
            assert torch.equal(slide(isanet, image), whole)


def test_stride_is_two_thirds_of_the_window_by_default():
    assert Inference(mode="slide", crop_size=(769, 513)).window_stride == (512, 342)
    assert Inference(mode="slide", crop_size=(1, 2)).window_stride == (1, 1)


def test_a_batch_gives_what_its_images_give(isanet):
    images = noise(40, 56, count=3)
    inference = Inference(mode="slide", crop_size=(24, 24), scales=[1, 1.5], flip=True)
    with torch.no_grad():
        alone = torch.cat([inference(isanet, image[None]) for image in images])
        assert torch.allclose(inference(isanet, images), alone, atol=1e-4)


# Whole


def test_whole_is_the_network_itself(isanet):
    image = noise(40, 56)
    assert torch.equal(Inference()(isanet, image), isanet(isanet.normalise(image))["out"])
    image = noise(37, 51)
    expected = isanet(isanet.normalise(image))["out"]
    assert torch.equal(Inference(pad_multiple=1)(isanet, image), expected)


@pytest.mark.parametrize(("align_corners", "padded"), [(False, (40, 56)), (True, (37, 51))])
def test_images_are_padded_to_the_stride_unless_corners_are_aligned(align_corners, padded):
    network = Pointwise()
    network.align_corners, network.output_stride = align_corners, 8
    Inference()(network, noise(37, 51))
    assert network.sizes == [padded]


@pytest.mark.parametrize(("size", "padded"), [((37, 51), (40, 56)), ((40, 56), (40, 56))])
def test_padding_with_the_mean_is_cropped_again(size, padded):
    network, image = Pointwise(), noise(*size)
    found = Inference(pad_multiple=8)(network, image)
    assert network.sizes == [padded]
    assert torch.equal(found, Inference()(Pointwise(), image))


def test_padding_is_on_the_right_and_at_the_bottom(isanet):
    image = noise(37, 51)
    x = isanet.normalise(image)
    wide = torch.zeros(1, 3, 40, 56)
    wide[:, :, :37, :51] = x
    expected = isanet(wide)["out"][:, :, :37, :51]
    assert torch.allclose(Inference(pad_multiple=8)(isanet, image), expected, atol=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
def test_base_size_scales_the_image_and_scales_the_scores_back(align_corners):
    network, image = Pointwise(), noise(30, 90)
    network.align_corners = align_corners
    found = Inference(base_size=(400, 101))(network, image)
    assert network.sizes == [(101, 303)]
    x = F.interpolate(network.normalise(image), (101, 303), mode="bilinear")
    expected = F.interpolate(
        F.conv2d(x, network.weight), (30, 90), mode="bilinear", align_corners=align_corners
    )
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("size", "scale", "seen"), [((3, 5), 0.5, (2, 3)), ((1, 9), 0.3, (1, 3))])
def test_sizes_are_rounded_half_up_and_never_to_nothing(size, scale, seen):
    network = Pointwise()
    Inference(scales=[scale])(network, noise(*size))
    assert network.sizes == [seen]


def test_sums_are_single_precision_whatever_the_network_computes_in():
    class Half(Pointwise):
        def __call__(self, x):
            return {"out": torch.full((len(x), 2, *x.shape[2:]), 1.0078125, dtype=torch.bfloat16)}

    image = noise(8, 8)
    slid = Inference(mode="slide", crop_size=(4, 4), stride=(1, 1))(Half(), image)
    assert slid.dtype == torch.float32
    assert torch.allclose(slid, torch.full_like(slid, 1.0078125))
    assert Inference(flip=True)(Half(), image).dtype == torch.float32


# Averages


def test_scales_and_flip_average_probabilities(isanet):
    image = noise(40, 56)
    views = []
    for factor, mirror in itertools.product((0.5, 1.0, 1.75), (False, True)):
        x = isanet.normalise(image)
        size = [int(s * factor + 0.5) for s in (40, 56)]
        x = F.interpolate(x, size, mode="bilinear") if factor != 1 else x
        logits = isanet(x.flip(-1) if mirror else x)["out"]
        logits = logits.flip(-1) if mirror else logits
        logits = F.interpolate(logits, (40, 56), mode="bilinear") if factor != 1 else logits
        views.append(logits.softmax(1))
    inference = Inference(scales=[0.5, 1.0, 1.75], flip=True, pad_multiple=1)
    found = inference(isanet, image)
    assert found.exp().std() > 0.02  # so that the next line means something
    assert torch.allclose(found.exp(), torch.stack(views).mean(0), atol=1e-5)
    assert torch.allclose(found.exp().sum(1), torch.ones(1, 40, 56), atol=1e-4)


def test_flip_exchanges_left_and_right_classes():
    class Sided(Pointwise):
        """Says 1 in its input's left half, 2 in the right one, as a network of arms would."""

        def __call__(self, x):
            out = torch.zeros(len(x), 4, *x.shape[2:])
            out[:, 1, :, : x.shape[3] // 2] = 9.0
            out[:, 2, :, x.shape[3] // 2 :] = 9.0
            return {"out": out}

    image = noise(4, 8)
    plain = Inference()(Sided(), image).argmax(1)
    # In the mirror the left arm is on the right, and the network calls it a right one: sure of it.
    sided = Inference(flip=True, mirrored_classes=[(1, 2)])(Sided(), image)
    assert torch.equal(sided.argmax(1), plain)
    assert sided.exp().max() > 0.99
    unsure = Inference(flip=True)(Sided(), image)
    assert unsure.exp().max() < 0.51


def test_a_single_scale_other_than_one_stays_logits(isanet):
    found = Inference(scales=[0.5])(isanet, noise(40, 56))
    assert (found > 0).any()


def test_impossible_probabilities_are_no_infinite_loss():
    class Certain(Pointwise):
        def __call__(self, x):
            out = torch.full((len(x), 2, *x.shape[2:]), -1e4)
            out[:, 0] = 1e4
            return {"out": out}

    assert Inference(flip=True)(Certain(), noise(4, 4)).isfinite().all()


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "tiles"}, "inference.mode is one of .*'tiles'"),
        ({"mode": "slide"}, "slide needs inference.crop_size"),
        ({"mode": "slide", "crop_size": (0, 4)}, r"crop_size must be two positive.*\(0, 4\)"),
        ({"base_size": (4, -1)}, r"base_size must be two positive.*\(4, -1\)"),
        ({"mode": "slide", "crop_size": (4, 4), "stride": (5, 1)}, r"\(5, 1\) is larger than"),
        ({"scales": []}, r"scales and pad_multiple must be positive, got \[\]"),
        ({"scales": [1, 0]}, r"must be positive, got \[1, 0\]"),
        ({"pad_multiple": 0}, "must be positive.*0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Inference(**arguments)


def gmacs(inference=None, size=(64, 64), **arguments):
    small = {"key_channels": 8, "value_channels": 8, "out_channels": 16, "aux_channels": 8}
    network = ISANet(5, "resnet18", **small, **arguments).train()
    return (inference or Inference()).count_gmacs(network, *size)


def test_arithmetic_is_that_of_the_published_formula():
    # 8x8 positions, in groups of 1 and 64 or of 4 and 16; 8 channels of keys and 8 of values.
    one, four = (gmacs(down_factors=[(p, p)]) for p in (1, 2))
    assert one - four == pytest.approx(64 * ((1 + 64) - (4 + 16)) * (8 + 8) / 1e9, rel=1e-6)


def test_arithmetic_is_counted_for_every_context_without_the_auxiliary_head():
    none = gmacs(context="none", aux_head=False)
    assert none == gmacs(context="none", aux_head=True) > 0
    for context in Context.__args__:
        assert gmacs(context=context) >= none
    # Products of 64 x 64 positions, with 8 channels of keys and 16 of values, in the dense one.
    assert gmacs(context="dense_sdpa") == pytest.approx(gmacs(context="dense"))


def test_the_context_module_is_counted_alone():
    network = ISANet(5, "resnet18", key_channels=8, value_channels=8, out_channels=16)
    views = Inference(scales=(1, 2))
    found = views.count_parts(network, 64, 64)["context"]
    parts = [gmacs_of_parts(network, edge, edge)["context"] for edge in (64, 128)]
    assert found == pytest.approx(sum(parts))
    assert found < views.count_gmacs(network, 64, 64)


def test_arithmetic_is_that_of_all_views_and_windows():
    once = gmacs(context="none")
    assert gmacs(Inference(flip=True), context="none") == pytest.approx(2 * once)
    assert gmacs(Inference(scales=(1, 2)), context="none") == pytest.approx(5 * once)
    slide = Inference(mode="slide", crop_size=(64, 64), stride=(64, 64))
    assert gmacs(slide, (128, 192), context="none") == pytest.approx(6 * once)


# The arithmetic of each part


@pytest.mark.parametrize("context", get_args(Context))
@pytest.mark.parametrize("form", get_args(Form))
def test_the_parts_of_a_network_add_up_to_its_arithmetic(form, context):
    network = ISANet(3, "resnet18", form=form, context=context, aux_head=True, aux_channels=8)
    parts = gmacs_of_parts(network, 41, 64)
    # On the stage before the last, of 256 channels: conv3x3 to 8, conv1x1 to 3.
    auxiliary = (256 * 9 * 8 + 8 * 3) * 6 * 8 / 1e9
    assert parts.pop("aux_head") == pytest.approx(auxiliary)
    whole = Inference(pad_multiple=1).count_gmacs(network, 41, 64)
    assert sum(parts.values()) == pytest.approx(whole)
    assert network.training
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_the_arithmetic_of_a_network_with_synchronised_norms(tmp_path):
    # In training, with a process group, they take GPUs alone and talk to the other processes.
    network = ISANet(3, "resnet18", context="ppm", aux_head=True, aux_channels=8)
    plain = gmacs_of_parts(network, 41, 64)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/a", rank=0, world_size=1)
    try:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert gmacs_of_parts(synced, 41, 64) == plain
        assert Inference().count_gmacs(synced.eval(), 41, 64) > 0
    finally:
        dist.destroy_process_group()
