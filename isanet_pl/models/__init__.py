"""The paper's attention, the backbones and the network."""

from isanet_pl.models.attention import ISABlock, ISAModule, SelfAttentionBlock2D
from isanet_pl.models.backbone import Backbone
from isanet_pl.models.fuse import fuse_for_inference
from isanet_pl.models.isanet import ISANet

__all__ = [
    "Backbone",
    "ISABlock",
    "ISAModule",
    "ISANet",
    "SelfAttentionBlock2D",
    "fuse_for_inference",
]
