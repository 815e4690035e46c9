"""`isanet-pl` and `python -m isanet_pl`."""

import multiprocessing
import os
import sys
import traceback

from torch import distributed

from isanet_pl.cli import main
from isanet_pl.errors import InputError


def run() -> None:
    """Runs the command line; errors of the user's input are one message and exit code 2.

    With ISANET_DEBUG=1 in the environment they keep their stack trace.
    """
    try:
        main()
    except Exception as error:
        told = isinstance(error, InputError) and os.environ.get("ISANET_DEBUG") != "1"
        if told:
            # From a loader process the message comes wrapped into the text of a stack trace.
            message = str(error).rsplit("InputError: ", maxsplit=1)[-1].strip()
            print(f"isanet-pl: error: {message}", file=sys.stderr)
        if distributed.is_available() and distributed.is_initialized():
            if not told:
                traceback.print_exc()
            _leave(2 if told else 1)
        if not told:
            raise
        sys.exit(2)
    finally:
        _kill_loaders()


def _leave(code: int) -> None:
    """Ends one of several processes at once.

    Python's exit would close the connection to the others, which on GPUs (NCCL) waits until all of
    them have come to the same point, and they wait for this one there, for half an hour.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=code)
    _kill_loaders()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kill_loaders() -> None:
    """Kills loader processes: Python's exit would ask with a signal that they outlive a while."""
    for process in multiprocessing.active_children():
        process.kill()


if __name__ == "__main__":
    run()
