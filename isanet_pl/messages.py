"""What the command line says, and what it leaves unsaid."""

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only

HIDDEN = {
    # Following the advice would break load_from_checkpoint (issue 20801 there).
    "Attribute .* is an instance of `nn.Module`": "pytorch/utilities/parsing.py",
    # Lightning's own use of torch's pytree, and its size estimate of the model.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "pytorch/utilities/_pytree.py",
    "Precision .* is not supported by the model summary": (
        "pytorch/utilities/model_summary/model_summary.py"
    ),
    # Of no use: we log by step, and short runs are short on purpose.
    "The number of training batches .* is smaller than the logging interval": (
        "pytorch/loops/fit_loop.py"
    ),
    # `predict` has nothing left to do, and says so itself.
    "Total length of `DataLoader` across ranks is zero": "pytorch/utilities/data.py",
    # A run in a new folder continues from a checkpoint in another: intended.
    "The dirpath has changed from": "pytorch/callbacks/model_checkpoint.py",
    # Of no use: its DDP is built on a stream of its own, which costs nothing here (21567 there).
    "The AccumulateGrad node's stream does not match": "pytorch/strategies/ddp.py",
    # It is: each process takes its share of the images, and none takes one twice.
    r"It is recommended to use `Trainer\(devices=1": (
        "pytorch/trainer/connectors/data_connector.py"
    ),
    # Scores are: the confusion matrix is summed over all processes before they are computed.
    r"It is recommended to use `self\.log\(.*sync_dist=True": (
        "pytorch/trainer/connectors/logger_connector/result.py"
    ),
    # Only `fit` keeps an average up, and refuses to drop it.
    r"Be aware that when using `ckpt_path`.*\['ExponentialAverage'\]": "pytorch/trainer/call.py",
    # A run that is resumed: its loader goes on where it was, and its files stay. Where runs have no
    # folder of their own, `LastCheckpoint` refuses to write over others.
    "You're resuming from a checkpoint that ended before the epoch ended": (
        "pytorch/loops/training_epoch_loop.py"
    ),
    "Experiment logs directory .* exists and is not empty": "fabric/loggers/csv_logs.py",
    "Checkpoint directory .* exists and is not empty": "pytorch/callbacks/model_checkpoint.py",
}
"""Warnings that are not shown, and where they come from, in the folder src/lightning of
https://github.com/Lightning-AI/pytorch-lightning."""


@rank_zero_only
def configure_messages() -> None:
    """Shows our own messages, and hides what is of no use to the user."""
    logger = logging.getLogger("isanet_pl")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    for message in HIDDEN:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Returns whether a message of Lightning's is worth showing.

    Those are not that tell of its other products, or that our summary takes the place of its own.
    """
    unwanted = "Tip: For seamless cloud", "already configured with model summary callbacks"
    return not any(part in record.getMessage() for part in unwanted)
