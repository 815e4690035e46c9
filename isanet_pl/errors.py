"""The error that people see."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names the value, the file and the fix.

    The command line prints it without a stack trace.
    """


def find_input_error(error: BaseException | None) -> InputError | None:
    """Returns the first InputError among an error and those it was raised from."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error
