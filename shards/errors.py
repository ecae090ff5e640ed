"""The one error of this package."""


class ShardError(Exception):
    """A data set cannot be written, found, read or scored as asked.

    The message is one line: what was got, what was expected and what to do.
    """
