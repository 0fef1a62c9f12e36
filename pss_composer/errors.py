"""The one error for what a user can cause and mend."""


class InputError(ValueError):
    """Bad input: one line that names the key or argument, the rule and the value.

    The command line prints the message alone and exits with status 1; any other exception is a bug of
    this project and keeps its traceback.
    """
