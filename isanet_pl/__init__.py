"""ISANet, interlaced sparse self-attention for semantic segmentation, on PyTorch Lightning."""

__version__ = "0.1.0"
