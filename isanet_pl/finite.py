"""Finding numbers that are not finite."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the largest absolute value, finite where all are; it waits for no device."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return get_total_norm(floats, norm_type=torch.inf)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with an element that is NaN or infinite."""
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)
