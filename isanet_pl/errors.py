"""The error that people see."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names the value, the file and the fix.

    The command line prints it without a stack trace.
    """
