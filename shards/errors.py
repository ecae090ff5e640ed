"""Errors of this package, all of them `ShardError`.

ShardError
|- OtherFormatError    written in another format
|- BadSampleError      the bytes of one sample are damaged
|- SourceError         the source of a data set has defects
|- PictureError        a picture that a user handed in cannot be used
|- DigestError         a store's file is not the one that the manifest lists
"""


class ShardError(Exception):
    """Raised when a data set cannot be written, found, read or scored as requested.

    The message is one line: what was got, what was expected and what to do.
    """


class OtherFormatError(ShardError):
    """Raised for a data set that a version of this package wrote in another format."""


class BadSampleError(ShardError):
    """Raised for a sample whose bytes changed or are not an image; the message names the sample."""


class PictureError(ShardError):
    """Raised for a picture that a user handed in and that cannot be used; the message does not name it."""


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; the class name if it has no message."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:200]
