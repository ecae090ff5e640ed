"""Retries of requests to remote stores: errors that may pass are retried, lasting ones become a message of one line.

The retries of the stores' own clients are switched off, because each client retries differently.
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from shards.errors import ShardError, one_line

LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Waits of 0.5, 1, 2, 4, 8, 15 and 15 s, each shortened at random so that the workers of a cluster do not all retry at
# the same moment: about half a minute in total, the time a store takes to restart. Ray may then restart the workers.
ATTEMPTS = 8
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0
HURRIED_ATTEMPTS = 3
_hurried: ContextVar[bool] = ContextVar("hurried", default=False)

# Error numbers of requests that are wrong in themselves (s3fs translates a store's responses to them).
_REFUSED = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG}
# Mistakes in the calling code, lack of memory, and what fsspec's file system of a store cannot do at all, which it answers
# with NotImplementedError: not errors of the store, and the same at each attempt.
_NOT_OURS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError, MemoryError)


# Errors of a network file system that its server or the network causes. A full disk and denied access are none of them.
_PASSING = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class StoreError(OSError):
    """Raised when a store did not respond well in all attempts; a later attempt may succeed."""


def may_pass(error: BaseException) -> bool:
    """Return True if a store or a network file system raised the error because it did not answer."""
    return isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno in _PASSING)


@contextmanager
def fewer_retries() -> Iterator[None]:
    """Limit the attempts of this thread in the block to `HURRIED_ATTEMPTS`: for a user who waits for a check."""
    token = _hurried.set(True)
    try:
        yield
    finally:
        _hurried.reset(token)


def with_retries(request: Callable[[], T], url: str) -> T:
    """Return the result of `request()`, retried while the store's error may pass.

    Raise `ShardError` at once if access is denied or the request refused, and `StoreError` after `ATTEMPTS` attempts
    (see `fewer_retries`); both name `url`. `FileNotFoundError` passes: only the caller knows what an absent file means.
    """
    attempts = min(HURRIED_ATTEMPTS, ATTEMPTS) if _hurried.get() else ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return request()
        except (FileNotFoundError, ShardError):
            raise
        except Exception as error:
            message = one_line(error)
            if _misset(error):
                raise ShardError(
                    f"{url}: a setting of the store's client is wrong ({message}); expected AWS_ENDPOINT_URL_S3 and "
                    "AWS_ENDPOINT_URL to be unset or like https://host:9000, and AWS_DEFAULT_REGION, AWS_PROFILE and "
                    "similar variables to name existing ones: correct the variable"
                ) from error
            if isinstance(error, _NOT_OURS):
                raise
            if _denied(error):
                raise ShardError(
                    f"{url}: access denied ({message}); expected credentials that allow it: give them in the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3), on every node"
                ) from error
            if _refused(error):
                raise ShardError(f"{url}: refused ({message}); check the address") from error
            if attempt == attempts:
                raise StoreError(
                    f"{url}: no good answer in {attempts} attempts; check the address (for S3 also AWS_ENDPOINT_URL_S3) and "
                    f"the network, then try again ({message})"
                ) from error
            wait_s = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1)
            level = logging.WARNING if attempt == 1 else logging.INFO  # one warning for each request
            LOG.log(level, "%s: %s; attempt %d of %d in %.1f s", url, message, attempt + 1, attempts, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _denied(error: Exception) -> bool:
    # Compared by name, because not every store's client is installed; botocore has NoCredentialsError and others.
    return isinstance(error, PermissionError) or type(error).__name__.endswith("CredentialsError")


def _misset(error: Exception) -> bool:
    # botocore's errors about the environment, some of them a plain ValueError or, through s3fs, of another class.
    message = str(error).lower()
    bad_endpoint = "invalid endpoint" in message or ("endpoint" in message and "not a valid uri" in message)
    return bad_endpoint or type(error).__name__ in ("InvalidRegionError", "ProfileNotFound", "InvalidRetryModeError")


def _refused(error: Exception) -> bool:
    if isinstance(error, (IsADirectoryError, NotADirectoryError)) or type(error).__name__ == "ParamValidationError":
        return True
    return isinstance(error, OSError) and error.errno in _REFUSED
