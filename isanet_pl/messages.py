"""What the command line says, and what it leaves unsaid."""

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def configure_messages() -> None:
    """Shows our own messages, and hides what is of no use to the user."""
    logger = logging.getLogger("isanet_pl")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    for message in (
        # Following the advice would break load_from_checkpoint (Lightning's issue 20801).
        "Attribute .* is an instance of `nn.Module`",
        # Lightning's own use of torch's pytree, and its size estimate of the model.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "Precision .* is not supported by the model summary",
        # Of no use: we log by step, and short runs are short on purpose.
        "The number of training batches .* is smaller than the logging interval",
        # `predict` has nothing left to do, and says so itself.
        "Total length of `DataLoader` across ranks is zero",
        # A run in a new folder continues from a checkpoint in another: intended.
        "The dirpath has changed from",
        # It is: each process takes its share of the images, and none takes one twice.
        r"It is recommended to use `Trainer\(devices=1",
        # Only `fit` keeps an average up, and refuses to drop it.
        r"Be aware that when using `ckpt_path`.*\['ExponentialAverage'\]",
        # A run that is resumed: its loader goes on where it was, and its files stay.
        "You're resuming from a checkpoint that ended before the epoch ended",
        "Experiment logs directory .* exists and is not empty",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Returns whether a message of Lightning's is worth showing.

    Those are not that tell of its other products, or that our summary takes the place of its own.
    """
    unwanted = "Tip: For seamless cloud", "already configured with model summary callbacks"
    return not any(part in record.getMessage() for part in unwanted)
