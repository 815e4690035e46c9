"""Against mmsegmentation itself: its ISANets converted, run by both, and loaded back.

Not part of the usual run, as mmsegmentation wants an environment of its own:

    bash scripts/setup_peer.sh
    .venv-peer/bin/python -m pytest -m peer -s tests/test_peer.py

`-s` shows the differences that were measured. Without mmsegmentation the file is skipped.
"""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from isanet_pl.convert import Trained, read_mmseg, read_trained, write_checkpoint, write_mmseg
from isanet_pl.convert.trained import DATA_SETS, Classes
from isanet_pl.inference import Inference
from isanet_pl.models import ISANet

pytestmark = pytest.mark.peer
if importlib.util.find_spec("mmseg") is None:
    pytest.skip("mmsegmentation is not installed; see the docstring", allow_module_level=True)


class Operators(types.ModuleType):
    """Stands for mmcv's compiled operators, which ISANet does not use but mmseg imports."""

    def __init__(self):
        super().__init__("mmcv.ops")
        self.__spec__ = importlib.machinery.ModuleSpec("mmcv.ops", None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


sys.modules["mmcv.ops"] = Operators()

import mmseg  # noqa: E402
import mmseg.models  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MessageHub  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint, save_checkpoint  # noqa: E402
from mmseg.datasets import ADE20KDataset, CityscapesDataset, PascalVOCDataset  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402

init_default_scope("mmseg")
CONFIGS = sorted((Path(mmseg.__file__).parent / ".mim/configs/isanet").glob("*.py"))
THEIRS = {"cityscapes": CityscapesDataset, "ade20k": ADE20KDataset, "voc": PascalVOCDataset}
SIZES = [(128, 200), (121, 203)]


def build(model_config):
    """Returns their network in eval mode, with BatchNorm in the place of SyncBN."""
    return revert_sync_batchnorm(MODELS.build(model_config)).eval()


def randomise(model):
    """Gives BatchNorm statistics and scales of either sign, and the classifier something to say."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.3, 0.7)
            module.weight.data *= torch.randn_like(module.weight).sign()
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.2, 1.5)
            module.num_batches_tracked += 80000
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)


def save_as_they_do(model, config, data_set, path):
    """Writes what mmengine's Runner writes, progress objects included."""
    hub = MessageHub.get_instance("peer")
    hub.update_scalar("train/loss", 0.5)
    meta = {
        "epoch": 0,
        "iter": 80000,
        "cfg": config.pretty_text,
        "dataset_meta": THEIRS[data_set].METAINFO,
        "experiment_name": "peer",
        "mmengine_version": "0.10.7",
        "time": "20210901_054739",
    }
    content = {"meta": meta, "state_dict": get_state_dict(model), "message_hub": hub.state_dict()}
    save_checkpoint(content, str(path))


def picture(size):
    """Returns smooth noise, RGB uint8 (1, 3, H, W)."""
    coarse = torch.rand(1, 3, size[0] // 8, size[1] // 8)
    return (torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 255).to(torch.uint8)


@torch.no_grad()
def logits_of(model, image):
    """Returns their logits in the way that their test_cfg names."""
    data = model.data_preprocessor({"inputs": [image[0].flip(0)]}, training=False)  # BGR
    size = tuple(image.shape[2:])
    return model.inference(data["inputs"], [{"img_shape": size, "ori_shape": size}])


def balance(classifier, logits):
    """Takes each class's mean from the classifier's bias, so that no class covers the image."""
    classifier.bias.data -= logits.mean(dim=(0, 2, 3))


@torch.no_grad()
def assert_same(ours, theirs, what):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    same = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    present = len(theirs.argmax(1).unique())
    print(f"{what}: {error:.1e} relative, {same:.4%} of pixels the same class, {present} classes")
    assert theirs.std() > 0.05
    assert present > 2
    assert error < 1e-5
    assert same == 1


def test_they_have_sixteen_settings():
    assert len(CONFIGS) == 16


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_outputs_are_theirs_and_the_way_back_loads(path, tmp_path):
    torch.manual_seed(0)
    config = Config.fromfile(path)
    config.model.pretrained = None
    data_set = next(name for name in THEIRS if name in path.stem)
    slides = config.model.test_cfg.mode == "slide"
    if slides:
        assert config.model.test_cfg.crop_size == (769, 769)
        # Windows that one core can do, of 8x + 1 pixels as well.
        config.model.test_cfg.update(crop_size=(97, 97), stride=(65, 65))
    model = build(config.model)
    randomise(model)
    balance(model.decode_head.conv_seg, logits_of(model, picture(SIZES[0])))
    save_as_they_do(model, config, data_set, tmp_path / "theirs.pth")

    trained = read_mmseg(tmp_path / "theirs.pth")
    write_checkpoint(trained, tmp_path / "ours.ckpt")
    network = ISANet.from_checkpoint(tmp_path / "ours.ckpt")
    assert trained.classes.data_set == data_set
    assert tuple(trained.classes.names) == DATA_SETS[data_set].class_names
    assert tuple(trained.classes.palette) == DATA_SETS[data_set].palette
    assert [list(c) for c in trained.classes.palette] == THEIRS[data_set].METAINFO["palette"]
    assert network.arguments["align_corners"] == slides
    assert network.inference.base_size == tuple(config.test_pipeline[1].scale)
    assert trained.steps == 80000
    # Base sizes are for files; here both see the same pixels.
    inference = Inference(
        network.inference.mode,
        network.inference.crop_size,
        network.inference.stride,
        pad_multiple=1,
    )
    for size in SIZES:
        image = picture(size)
        with torch.no_grad():
            ours = inference(network, image)
        assert_same(ours, logits_of(model, image), f"{path.stem} {inference.mode} {size}")

    with torch.no_grad():
        features = model.extract_feat(network.normalise(image))
        aux = network.aux_head(network.backbone(network.normalise(image))[0])
    assert_same(aux, model.auxiliary_head(features), f"{path.stem} auxiliary")

    write_mmseg(read_trained(tmp_path / "ours.ckpt"), tmp_path / "back.pth")
    other = build(config.model)
    load_checkpoint(other, str(tmp_path / "back.pth"), map_location="cpu", strict=True)
    before = model.state_dict()
    for name, value in other.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.parametrize("backbone", ["resnet50c", "resnet101s"])
def test_network_of_ours_runs_in_theirs(backbone, tmp_path):
    torch.manual_seed(0)
    network = ISANet(
        5, backbone, form="reduced", context_first=False, value_bias=False, aux_channels=64,
        align_corners=True, down_factors=[(4, 8)], mean=(10.0, 20.0, 30.0), std=(40.0, 50.0, 60.0),
    ).eval()  # fmt: skip
    randomise(network)
    network.inference = Inference("slide", (97, 129), (65, 65))
    balance(network.classifier, network.inference(network, picture(SIZES[0])).detach())
    classes = Classes(list("abcde"), [(i, i, i) for i in range(5)])
    write_mmseg(Trained(network, classes), tmp_path / "theirs.pth")
    meta = torch.load(tmp_path / "theirs.pth", weights_only=True)["meta"]
    model = build(Config.fromstring(meta["cfg"], ".py").model)
    load_checkpoint(model, str(tmp_path / "theirs.pth"), map_location="cpu", strict=True)
    for size in SIZES:
        image = picture(size)
        with torch.no_grad():
            ours = network.inference(network, image)
        assert_same(ours, logits_of(model, image), f"{backbone} of ours {size}")
