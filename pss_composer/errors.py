"""The one error for what a user can cause and mend, and how the command lines tell it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one line that names the key or argument, the rule and the value.

    The command lines print the message alone and exit with status 1; any other exception is a bug of this project
    and keeps its traceback.
    """


def to_line(error: BaseException) -> str:
    """The message of an exception in one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def exit_on_input_error(*, debug: bool) -> Iterator[None]:
    """Ends the program with one line and exit status 1 on an `InputError`; with its traceback under `debug`."""
    try:
        yield
    except InputError as error:
        if debug:
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")


@contextmanager
def name_argument(key: str) -> Iterator[None]:
    """Turns a `ValueError` whose message begins with an argument's name into an `InputError` on a recipe's key."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{key}.{error}".lstrip(".")) from error
