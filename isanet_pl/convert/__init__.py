"""Checkpoints of mmsegmentation and of the authors (openseg.pytorch) as ours, ours as theirs.

What the weights alone do not say travels with them: how the network is built (stem, order of the
concatenation, activation, rounding, corners), how its input is normalised, how images are shown to
it, and what its classes are. So the network's logits are equal, to rounding. A file of
mmsegmentation has no place for scales, flip and the padding of windows: these are named when one is
written.
"""

from isanet_pl.convert.mmseg import read_mmseg
from isanet_pl.convert.openseg import read_openseg
from isanet_pl.convert.to_mmseg import write_mmseg
from isanet_pl.convert.trained import DATA_SETS, Trained, read_trained, write_checkpoint

__all__ = [
    "DATA_SETS",
    "Trained",
    "read_mmseg",
    "read_openseg",
    "read_trained",
    "write_checkpoint",
    "write_mmseg",
]
