"""The errors of this package."""


class ShardError(Exception):
    """A data set cannot be written, found, read or scored as asked.

    The message is one line: what was got, what was expected and what to do.
    """


class OtherFormatError(ShardError):
    """A data set was written by a version of this package whose format is another."""


class BadSampleError(ShardError):
    """The bytes of one sample are not those that were written, or are no picture; the message names it."""


def one_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
