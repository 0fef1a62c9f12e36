"""How settings are checked: all rules at once, and errors under the keys that the user knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pss_composer.errors import InputError, InputErrors


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
