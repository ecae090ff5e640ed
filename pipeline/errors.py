"""The errors a person can cause or must act on, each one line: what was got, what was expected, what to do.

`PipelineError` is the root of what this package raises. `detr` and `shards` know nothing of each other or of this
package, so each has a root of its own (`detr.config.ConfigError`, `shards.errors.ShardError`); `USER_ERRORS` joins
the three for the command line, which prints them without a traceback and exits with status 1.
"""

from __future__ import annotations

from detr.config import ConfigError
from shards.errors import ShardError


class PipelineError(Exception):
    """Root of the errors of `pipeline` and `jobs`."""


class RunConfigError(PipelineError):
    """A run's configuration is impossible, or does not fit its data."""


class CheckpointError(PipelineError):
    """A checkpoint is absent, incomplete or of another run."""


class TrackingError(PipelineError):
    """The tracking server does not answer, or does not know the run."""


class RegistryError(PipelineError):
    """No such registered model, version or alias, or it cannot be used this way."""


class ExchangeError(PipelineError):
    """A file of weights cannot be imported, or a model cannot be exported as asked."""


class TrainingError(PipelineError):
    """Training stopped for a reason that the message names."""


class Interrupted(TrainingError):
    """Stopped by a person or a scheduler; goes on with `detr resume`, as its exit status says."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again


USER_ERRORS: tuple[type[Exception], ...] = (PipelineError, ConfigError, ShardError)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
