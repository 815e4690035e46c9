"""What errors of the system and of other libraries mean for the user, and what to do about them."""

import errno
import traceback
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from isanet_pl.callbacks.ranks import HINT
from isanet_pl.errors import InputError, find_input_error

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a user's share of it, or a file is full."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "less than INT_MAX elements",  # of older releases, whose upsampling takes no larger maps
)
"""What PyTorch says, of CPUs and GPUs, when memory does not suffice."""

UNREACHED = torch.distributed.DistNetworkError, torch.distributed.DistStoreError
"""What PyTorch raises where one process waits for another that does not answer."""

SLIDING = "--model.inference.mode slide --model.inference.crop_size '[512, 512]'"
"""What takes less memory in evaluation."""


def explain(error: Exception) -> InputError | None:
    """Returns what to tell the user instead of an error; None if it may be a bug."""
    if isinstance(error, OSError) and error.errno in FULL:
        # From wherever the run writes: metrics, pictures, predictions. Checkpoints say it better.
        return find_input_error(error) or InputError(
            f"cannot write: {error.strerror}. What was written before is kept; make room, then run "
            "the same command again, for fit with --resume true"
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return InputError(
            "BatchNorm needs several values of a channel, and this network pools an image to one: "
            "set --data.batch_size 2 or more, --trainer.sync_batchnorm true on several GPUs, or "
            f"--model.freeze_bn true ({error})"
        )
    if isinstance(error, RuntimeError) and "does not allow for gradient clipping" in str(error):
        return InputError(
            "in 16-mixed, --trainer.gradient_clip_val does not go together with an optimiser that "
            f"is `fused`: leave one of them out, or take --trainer.precision bf16-mixed ({error})"
        )
    if isinstance(error, RuntimeError) and "a deterministic implementation" in str(error):
        return InputError(
            "--trainer.deterministic true: a part of this network has no deterministic way on "
            f"this device; warn tells of it and goes on ({error})"
        )
    if isinstance(error, ValueError) and "SyncBatchNorm" in str(error):
        return InputError(f"--trainer.sync_batchnorm true needs GPUs ({error})")
    if isinstance(error, MisconfigurationException | ValueError) and _comes_from(
        error, "lightning"
    ):
        return InputError(str(error).strip())  # it refuses one of its own options
    if isinstance(error, UNREACHED):
        return InputError(
            "the processes of this run cannot reach each other: at its start, another run may use "
            "the same MASTER_PORT, or a machine may not have started; later, one has died, and "
            f"{HINT}\n  ({str(error).strip()})"
        )
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    ):
        return InputError(
            "the connection to another process of this run is lost, most likely because it has "
            f"died: see what it said, if it could. {HINT}\n  ({str(error).strip()})"
        )
    if type(error).__module__.startswith("wandb."):
        return InputError(
            f"W&B: {error}\nuse --wandb offline, and upload the run later with `wandb sync`"
        )
    return None


def _comes_from(error: Exception, package: str) -> bool:
    """Returns whether code of a package raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith(f"{package}.")


def out_of_memory(error: BaseException | None) -> str | None:
    """Returns what to say if an error, or one that it was raised from, is for want of memory."""
    while error is not None:
        said = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return "out of memory"
        if isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY):
            return "out of memory"
        if isinstance(error, RuntimeError) and "unable to find an engine to execute" in said:
            return f"cuDNN found no way to compute this, most likely out of memory ({said.strip()})"
        if isinstance(error, RuntimeError) and said.startswith("DataLoader worker"):
            # Linux does not say why; that of a container may have too little shared memory.
            return f"a loader process has died, most likely out of memory ({said.strip()})"
        error = error.__cause__ or error.__context__
    return None


def less_memory(command: str, config: Any) -> str:
    """Returns what takes less memory, as options with the values that they have now.

    Args:
        command: The one that ran out of memory.
        config: Its config.
    """
    if command == "export":
        options = _less_for_export(config)
    else:
        options = _less_for_training(config) if command == "fit" else []
        options += _less_for_inference(command, config)
    context = config.model.network.context
    if context in ("dense", "rcca"):
        options.append(f"--model.network.context isa (now {context}; train anew)")
    if not options:
        return "it takes a machine with more memory, or a smaller network"
    return "\n  ".join(["try one or more of", *options])


def _less_for_export(config: Any) -> list[str]:
    size, images = list(config.size), config.num_calibration
    options = [f"--size '{[max(1, side // 2) for side in size]}' (now {size})"]
    if config.images is not None and images > 1:
        options.append(f"--num_calibration {images // 2} (now {images})")
    return options


def _less_for_inference(command: str, config: Any) -> list[str]:
    data, options = config.data.init_args, []
    if config.model.inference.mode == "whole":
        options.append(f"{SLIDING} (evaluation now sees whole images)")
    if command != "predict" and data.eval_batch_size > 1:  # it takes them one by one
        options.append(f"--data.eval_batch_size 1 (now {data.eval_batch_size})")
    workers = data.num_workers
    if workers != 0:
        now = "one for each core" if workers is None else workers
        fewer = 0 if workers == 1 else 1
        options.append(f"--data.num_workers {fewer} (now {now}; each takes memory)")
    return options


def _less_for_training(config: Any) -> list[str]:
    data, network = config.data.init_args, config.model.network
    options = []
    batch, parts = data.batch_size, config.trainer.accumulate_grad_batches
    if batch >= 4:  # BatchNorm wants more than one image
        options.append(
            f"--data.batch_size {batch // 2} --trainer.accumulate_grad_batches {2 * parts} "
            f"(now {batch} and {parts})"
        )
    crop = list(data.crop_size)
    options.append(f"--data.crop_size '{[side // 4 * 3 for side in crop]}' (now {crop})")
    if "mixed" not in str(config.trainer.precision):
        options.append("--trainer.precision bf16-mixed")
    if network.context == "isa" and not network.recompute:
        options.append("--model.network.recompute true")
    if network.form == "direct" and not network.classify_before_upsampling:
        options.append("--model.network.classify_before_upsampling true")
    return options
