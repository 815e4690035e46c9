"""The error that people see, and how its messages name many things."""

from collections.abc import Sequence
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong: the message names the value, the file and the fix.

    The command line prints it without a stack trace.
    """


def find_input_error(error: BaseException | None) -> InputError | None:
    """Returns the first InputError among an error and those it was raised from."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def few(names: Sequence[str], most: int = 5, count: int | None = None) -> str:
    """Returns the first names, and how many more there are.

    Args:
        names: All of them, or those that are known.
        most: How many to give.
        count: How many there are; None: the known ones.
    """
    more = (len(names) if count is None else count) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def why_no_checkpoint(path: str | Path, error: Exception) -> str:
    """Returns why a file could not be read as a checkpoint of a trained network.

    Args:
        path: The file.
        error: What reading it raised; torch's own advice would be to execute what is in the file.
    """
    if Path(path).suffix == ".pt2":
        reason = "it is an exported network, which torch.export.load reads"
    elif isinstance(error, KeyError | TypeError):
        reason = (
            "it does not describe its network; weights of other projects become one with "
            "scripts/convert_checkpoint.py"
        )
    elif isinstance(error, ValueError):
        reason = str(error)
    else:
        reason = "it is damaged, or holds more than data: nothing in it was executed"
    return f"{path} is not a checkpoint of isanet-pl: {reason}"
