"""Data sets: one class each, on a common base."""

from isanet_pl.data.camvid import CamVid
from isanet_pl.data.datamodule import SegmentationDataModule
from isanet_pl.data.folder import SegmentationFolder
from isanet_pl.data.synthetic import Synthetic

__all__ = ["CamVid", "SegmentationDataModule", "SegmentationFolder", "Synthetic"]
