"""Patience with stores, in one place: what may pass is tried again, what stays as it is becomes one clear line.

The stores' own clients would each try again in their own way, so they are told not to (see ``shards.storage``).
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

# Waits of 0.5, 1, 2, 4, 8, 15 and 15 s, each shortened by chance so that a cluster's workers do not return together:
# about half a minute, which a restart of a store takes; Ray's restarts of the workers come on top.
ATTEMPTS = 8
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0
HURRIED_ATTEMPTS = 3
_hurried: ContextVar[bool] = ContextVar("hurried", default=False)

# What a store says of a request that is wrong in itself (s3fs gives its answers such numbers).
_REFUSED = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG}
# Mistakes in this code, and lack of memory: neither is the store's.
_NOT_OURS = (TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError, MemoryError)


class StoreError(OSError):
    """A store that gave no good answer, however often it was asked; asking later may mend it."""


@contextmanager
def hurried() -> Iterator[None]:
    """Inside the block this thread asks ``HURRIED_ATTEMPTS`` times: where a person waits to hear whether an address is right."""
    token = _hurried.set(True)
    try:
        yield
    finally:
        _hurried.reset(token)


def patiently(ask: Callable[[], T], url: str) -> T:
    """What ``ask`` returns, asked again while the store's error may pass.

    Raises ShardError at once where access is denied or the request refused, StoreError after ``ATTEMPTS`` attempts (see ``hurried``),
    each naming the url in one line; FileNotFoundError passes, because what an absent file means only the caller knows.
    """
    attempts = min(HURRIED_ATTEMPTS, ATTEMPTS) if _hurried.get() else ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return ask()
        except (FileNotFoundError, ShardError):
            raise
        except Exception as error:
            said = one_line(error)
            if _misset(error):
                raise ShardError(
                    f"{url}: a setting of the store's client is wrong ({said}); expected AWS_ENDPOINT_URL_S3 and "
                    "AWS_ENDPOINT_URL to be unset or like https://host:9000, and AWS_DEFAULT_REGION, AWS_PROFILE and the "
                    "like to be ones that exist: correct the one that this names"
                ) from error
            if isinstance(error, _NOT_OURS):
                raise
            if _denied(error):
                raise ShardError(
                    f"{url}: access denied ({said}); expected credentials that allow it: give them in the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3), on every node"
                ) from error
            if _refused(error):
                raise ShardError(f"{url}: refused ({said}); check the address") from error
            if attempt == attempts:
                raise StoreError(
                    f"{url}: no good answer in {attempts} attempts; check the address (for S3 also AWS_ENDPOINT_URL_S3) and "
                    f"the network, then try again ({said})"
                ) from error
            wait_s = min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1)
            LOG.warning("%s: %s; attempt %d of %d in %.1f s", url, said, attempt + 1, attempts, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _denied(error: Exception) -> bool:
    # By its name, because only some stores' clients are installed: botocore's NoCredentialsError and its like.
    return isinstance(error, PermissionError) or type(error).__name__.endswith("CredentialsError")


def _misset(error: Exception) -> bool:
    # What botocore says of the environment, some of it as a bare ValueError or, through s3fs, under another class.
    said = str(error).lower()
    named = "invalid endpoint" in said or ("endpoint" in said and "not a valid uri" in said)
    return named or type(error).__name__ in ("InvalidRegionError", "ProfileNotFound", "InvalidRetryModeError")


def _refused(error: Exception) -> bool:
    final = isinstance(error, (IsADirectoryError, NotADirectoryError)) or type(error).__name__ == "ParamValidationError"
    return final or (isinstance(error, OSError) and error.errno in _REFUSED)
