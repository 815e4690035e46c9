"""Data sets: one class each, on a common base."""

from isanet_pl.data.ade20k import ADE20K
from isanet_pl.data.camvid import CamVid
from isanet_pl.data.cityscapes import Cityscapes
from isanet_pl.data.coco_stuff import COCOStuff10k, COCOStuff164k
from isanet_pl.data.datamodule import SegmentationDataModule
from isanet_pl.data.folder import SegmentationFolder
from isanet_pl.data.images import Images
from isanet_pl.data.lip import LIP
from isanet_pl.data.pascal_context import PascalContext
from isanet_pl.data.synthetic import Synthetic
from isanet_pl.data.voc import VOC

__all__ = [
    "ADE20K",
    "LIP",
    "VOC",
    "COCOStuff10k",
    "COCOStuff164k",
    "CamVid",
    "Cityscapes",
    "Images",
    "PascalContext",
    "SegmentationDataModule",
    "SegmentationFolder",
    "Synthetic",
]
