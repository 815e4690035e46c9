"""The benchmark's metric: mIoU, accuracies and per-class IoU from one confusion matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex


class SegmentationMetrics(MulticlassJaccardIndex):
    """Accumulates one confusion matrix over a whole split and returns all scores from it.

    mIoU is torchmetrics' macro JaccardIndex: the mean over classes of the IoU of the accumulated
    matrix (not the mean over images), ignored pixels left out, and classes that occur in neither
    label nor prediction left out of the mean.

    Args:
        num_classes: K.
        class_names: One name for each class; "0", "1", ... if None.
        ignore_index: Label that is left out.

    Attributes:
        confusion: (K, K) numbers of pixels behind the last `compute`, over all processes; rows are
            the label, columns the prediction. It outlives `reset`.

    Raises:
        ValueError: There are not as many names as classes, or a name occurs twice.
    """

    def __init__(
        self, num_classes: int, class_names: Sequence[str] | None = None, ignore_index: int = 255
    ) -> None:
        # validate_args would run torch.unique on every batch; `update` has its own, cheaper check.
        super().__init__(
            num_classes, average="macro", ignore_index=ignore_index, validate_args=False
        )
        names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if len(names) != num_classes or len(set(names)) != num_classes:
            raise ValueError(f"{num_classes} classes need as many different names, got {names}")
        self.class_names = names
        self.ignored = ignore_index
        self.confusion = self.confmat.clone()

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            prediction: (N, H, W) integer class map with values 0..K-1.
            target: (N, H, W) integer class map with values 0..K-1 or `ignore_index`.

        Raises:
            ValueError: The shapes differ, or a value is outside the classes.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ"
            )
        prediction, target = prediction.long(), target.long()
        for name, values in (
            ("prediction", prediction),
            ("target", target.where(target != self.ignored, 0)),
        ):
            low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
            if low < 0 or high >= self.num_classes:
                wrong = low if low < 0 else high
                raise ValueError(f"{name} holds {wrong}, outside 0..{self.num_classes - 1}")
        # As torchmetrics' own, which in deterministic mode, and on Apple GPUs, counts by a table of
        # all pixels by all pairs of classes: 59 GB for one image of ADE20K.
        k = self.num_classes
        cells = torch.where(target == self.ignored, k * k, target * k + prediction)
        self.confmat += torch.bincount(cells.flatten(), minlength=k * k + 1)[:-1].view(k, k)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # all scores, not the first
        """Returns scalars as fractions: `miou`, `macc`, `aacc` and `iou/NAME` for each class.

        A class that is in neither label nor prediction has IoU NaN. `macc` is the mean recall of
        the classes that occur in the labels. Everything is NaN when all pixels were ignored.
        """
        self.confusion = self.confmat.clone()
        confusion = self.confusion.cpu().double()  # Apple GPUs have no float64
        hits = confusion.diag()
        labels, predictions = confusion.sum(dim=1), confusion.sum(dim=0)
        iou = hits / (labels + predictions - hits)  # 0 / 0 is NaN: absent
        seen = labels.sum() > 0
        nan = torch.full_like(labels.sum(), torch.nan)
        scores = {
            "miou": torch.where(seen, super().compute().cpu().double(), nan),
            "macc": (hits / labels).nanmean(),
            "aacc": hits.sum() / labels.sum(),
        }
        scores.update({f"iou/{name}": iou[i] for i, name in enumerate(self.class_names)})
        return {name: score.float().to(self.confmat.device) for name, score in scores.items()}


class MeanLoss(Metric):
    """Returns the mean of losses over the images that have labels, over all processes.

    NaN if one of them is: a network that has diverged must not look better for it. (torchmetrics'
    MeanMetric leaves NaN out or, with nan_strategy="disable", the weights.)
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, images: Tensor) -> None:
        """Counts a batch.

        Args:
            loss: Its mean loss.
            images: How many of its images have labels.
        """
        self.total += loss.detach() * images
        self.count += images

    def compute(self) -> Tensor:
        """Returns the mean; zero where nothing had a label."""
        return self.total / self.count.clamp(min=1)
