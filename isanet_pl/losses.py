"""The training loss: pixel cross-entropy with ignored pixels, class weights and OHEM."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a tensor over all ranks, without its gradient; of a single one, itself.

    Nothing waits for it: Lightning's `sync_dist` stops every rank at a barrier first.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


@final
class SegmentationLoss(nn.Module):
    """Returns the cross-entropy of the main and, weighted, of the auxiliary logits.

    With OHEM (online hard example mining) only pixels whose true class has a probability below a
    threshold count in the loss of the main logits; the auxiliary head's counts all, as in
    openseg's `fs_auxohemce_loss` and mmsegmentation's example of its `OHEMPixelSampler`.

    The mean is over the counted pixels, as in `torch.nn.CrossEntropyLoss` and openseg (whose OHEM
    divides by the number of pixels, not by the sum of their class weights). mmsegmentation's
    default, `avg_non_ignore=False`, divides by all pixels instead, so that its steps are the
    smaller the more of a crop is padding.

    In training on several ranks the mean is that over the counted pixels of all of them: the mean
    of the ranks' losses, and DDP's of their gradients, are those of one process with all images.

    Args:
        class_weights: One weight for each class; None weighs all the same. The mean is taken over
            the weights of the counted pixels, as in `torch.nn.CrossEntropyLoss`.
        ohem_threshold: Count only pixels whose true class has at most this probability, 0.7 in the
            literature; None counts all.
        ohem_min_kept: With OHEM, count at least this many pixels of a batch on a device, the
            hardest; as openseg. (mmsegmentation's `min_kept` is of one image.)
        aux_weight: Weight of the auxiliary head's loss.
        ignore_index: Label of pixels that never count.

    Raises:
        ValueError: A threshold or weight is out of its range.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100_000,
        aux_weight: float = 0.4,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
            raise ValueError(f"ohem_threshold is a probability in (0, 1], got {ohem_threshold}")
        if class_weights is not None and not all(weight >= 0 for weight in class_weights):
            raise ValueError(f"class_weights must be numbers >= 0, got {list(class_weights)}")
        if not 0 <= aux_weight < math.inf:
            raise ValueError(f"aux_weight must be a number of at least 0, got {aux_weight}")
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index
        self._told = False

    def forward(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Returns the scalar loss, fp32; zero with zero gradients where every pixel is ignored.

        Args:
            outputs: `out` and, if there is one, `aux`: logits (N, K, H, W), any float dtype.
            target: (N, H, W) integer class map.

        Raises:
            ValueError: There are not as many class weights as classes.
        """
        num_classes = outputs["out"].shape[1]
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} entries for {num_classes} classes"
            )
        target = target.long()
        counted = target != self.ignore_index
        weights = counted.float()
        if self.class_weights is not None:
            # Any class will do at ignored pixels: they are multiplied by zero.
            weights = weights * self.class_weights[target.clamp(0, num_classes - 1)]
        losses = self._cross_entropy(outputs["out"], target)
        main_weights = weights
        if self.ohem_threshold is not None:
            main_weights = weights * self._is_hard(losses.detach(), counted, self.ohem_threshold)
        shares = self._shares(main_weights)
        loss = (losses * shares).sum()
        if "aux" in outputs:
            if self.ohem_threshold is not None:
                shares = self._shares(weights)
            losses = self._cross_entropy(outputs["aux"], target)
            loss = loss + self.aux_weight * (losses * shares).sum()
        return loss

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of each pixel, fp32 (N, H, W), zero where it is ignored."""
        # fp32 also under autocast: a sum over 10^5 pixels does not fit into 8 bits of mantissa.
        return F.cross_entropy(
            logits.float(), target, ignore_index=self.ignore_index, reduction="none"
        )

    def _shares(self, weights: Tensor) -> Tensor:
        """Returns each pixel's share in the mean, of weights (N, H, W) that may all be zero."""
        total = weights.sum()
        if self.training:
            total = mean_over_ranks(total)
        # Not a tiny number instead of zero: in fp16, a scaled gradient divided by it is infinite.
        return weights / total.where(total > 0, 1.0)

    def _is_hard(self, losses: Tensor, counted: Tensor, threshold: float) -> Tensor:
        """Returns a bool map: probability at most the threshold, or among the hardest."""
        # Those that do not count come last. Taking them out would have to wait for a GPU.
        probability = (-losses).exp().masked_fill(~counted, 2.0).flatten()
        if self.ohem_min_kept >= probability.numel() and not self._told:
            self._told = True
            log.warning(
                "OHEM keeps all pixels: model.loss.ohem_min_kept is %d, and a batch on a device "
                "has %d; give less, such as a tenth of these",
                self.ohem_min_kept,
                probability.numel(),
            )
        kept = min(max(self.ohem_min_kept, 1), probability.numel())
        # Not `kthvalue`: for one long row, that runs on one multiprocessor of a GPU.
        limit = probability.topk(kept, largest=False, sorted=False).values.amax()
        limit = limit.clamp(min=threshold)
        return (probability <= limit).view_as(counted)
