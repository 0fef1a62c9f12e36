"""The one error for what a user can cause and mend, and how the command lines print it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

HEAD_START = 5.0  # seconds that rank 0 has to report an error before another rank does


class InputError(ValueError):
    """Bad input: one line that names the argument or key, the rule and the value.

    A function names its own argument; the app, which knows the recipe, puts its key there (`checks.name_keys`).
    The command lines print the line and exit with status 1; any other exception is a bug and keeps its traceback.

    Args:
        rule: The rule and the value, like `must be at least 1, got 0`.
        key: The argument or key that breaks the rule; empty where the rule itself says what it is about.
    """

    def __init__(self, rule: str, *, key: str = "") -> None:
        super().__init__(f"{key} {rule}" if key else rule)
        self.rule = rule
        self.key = key


class InputErrors(InputError):
    """Several mistakes at once, one line each.

    Args:
        errors: The mistakes, at least one.
    """

    def __init__(self, errors: Iterable[InputError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(map(str, self.errors)))


def to_line(error: BaseException) -> str:
    """The message of an exception as one line, or its class if it has no message."""
    if type(error) is KeyError:
        return f"there is no {error}"  # its message is the key alone
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def exit_on_input_error(*, debug: bool) -> Iterator[None]:
    """On an `InputError`, end the program with exit status 1 and a line per mistake; `debug` keeps the traceback.

    Composer's launcher ends all ranks when the first one fails. Most mistakes show on every rank: rank 0, which writes
    to the terminal, reports them; another rank reports what is left to report when rank 0 goes on.
    """
    try:
        yield
    except InputError as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(HEAD_START)
        if debug:
            raise
        errors = error.errors if isinstance(error, InputErrors) else [error]
        sys.exit("\n".join(f"error: {to_line(error)}" for error in errors))
