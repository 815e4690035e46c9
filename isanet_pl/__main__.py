"""`isanet-pl` and `python -m isanet_pl`."""

import multiprocessing
import os
import sys

from isanet_pl.cli import main
from isanet_pl.errors import InputError


def run() -> None:
    """Runs the command line; errors of the user's input are one message and exit code 2.

    With ISANET_DEBUG=1 in the environment they keep their stack trace.
    """
    try:
        main()
    except InputError as error:
        if os.environ.get("ISANET_DEBUG") == "1":
            raise
        # From a loader process the message comes wrapped into the text of a stack trace.
        message = str(error).rsplit("InputError: ", maxsplit=1)[-1].strip()
        print(f"isanet-pl: error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        # Python's exit would ask loader processes with the signal that they outlive for a while.
        for process in multiprocessing.active_children():
            process.kill()


if __name__ == "__main__":
    run()
