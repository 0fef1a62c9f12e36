"""The one error for what a user can cause and mend, and how the command lines print it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Bad input: one line that names the argument or key, the rule and the value.

    A function names its own argument. The app, which knows the recipe, puts the recipe's key there instead (`name_keys`).
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


def find_broken(settings: object, *rules: tuple[str, bool, str]) -> list[InputError]:
    """The errors for those rules that settings break.

    Args:
        settings: An object whose attributes are the settings.
        rules: Name of an attribute, whether the rule holds, and the rule in words, like `must be at least 1`.
    """
    return [
        InputError(f"{rule}, got {getattr(settings, name)!r}", key=name) for name, holds, rule in rules if not holds
    ]


def collect_errors(check: Callable[..., object], *args: Any, **kwargs: Any) -> list[InputError]:
    """The errors that a function raises when it is called with these arguments."""
    try:
        check(*args, **kwargs)
    except InputErrors as error:
        return error.errors
    except InputError as error:
        return [error]
    return []


def raise_errors(errors: Iterable[InputError]) -> None:
    """Raise the errors together if there are any.

    Raises:
        InputError: There is one, or there are several.
    """
    errors = list(errors)
    if errors:
        raise errors[0] if len(errors) == 1 else InputErrors(errors)


@contextmanager
def name_keys(rename: Callable[[str], str]) -> Iterator[None]:
    """Rename the keys of the errors that the block raises.

    Args:
        rename: From an argument's name to the key that the user knows. Errors without a key stay as they are.
    """
    try:
        yield
    except InputErrors as error:
        raise InputErrors(rename_keys(error.errors, rename)) from error
    except InputError as error:
        if not error.key:
            raise
        raise type(error)(error.rule, key=rename(error.key)) from error


def rename_keys(errors: Iterable[InputError], rename: Callable[[str], str]) -> list[InputError]:
    """The same errors under other keys; see `name_keys`."""
    return [InputError(error.rule, key=rename(error.key)) if error.key else error for error in errors]


def to_line(error: BaseException) -> str:
    """The message of an exception as one line, or its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def exit_on_input_error(*, debug: bool) -> Iterator[None]:
    """End the program with exit status 1 and a line per mistake on an `InputError`; with its traceback under `debug`."""
    try:
        yield
    except InputError as error:
        if debug:
            raise
        errors = error.errors if isinstance(error, InputErrors) else [error]
        sys.exit("\n".join(f"error: {to_line(error)}" for error in errors))
