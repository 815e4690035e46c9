"""When the memory does not suffice: how PyTorch says it, and what a user can do."""

from typing import Any

import torch

# As the allocators of CPUs, GPUs and Apple's GPUs, and the loader, say it.
SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "killed by signal: Killed",  # a loader process, by Linux
    "out of shared memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error, or one that it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


def advice(command: str, config: Any) -> str:
    """Returns what takes less memory, as options with the values that they have now.

    Args:
        command: The one that ran out of memory.
        config: Its config.
    """
    data, network = config.data.init_args, config.model.network
    options = []
    if command == "fit":
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
        if network.context in ("dense", "rcca"):
            options.append(f"--model.network.context isa (now {network.context})")
        if network.form == "direct" and not network.classify_before_upsampling:
            options.append("--model.network.classify_before_upsampling true")
    if config.model.inference.mode == "whole":
        options.append(
            "--model.inference.mode slide --model.inference.crop_size '[512, 512]' (evaluation "
            "now sees whole images)"
        )
    if data.eval_batch_size > 1:
        options.append(f"--data.eval_batch_size 1 (now {data.eval_batch_size})")
    options.append("--data.num_workers 1 (each loader process takes memory too)")
    return "try one or more of\n  " + "\n  ".join(options)
