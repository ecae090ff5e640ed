"""Errors that users can cause or must act on, each with a message of one line: got, expected, what to do.

* Exception
  * PipelineError: raised in `pipeline` and `jobs`
    * RunConfigError
    * CheckpointError
    * TrackingError
      * TrackingAway
    * RegistryError
    * ExchangeError
    * TrainingError
      * Diverged: a loss or gradient is not finite or too large (`pipeline.training.divergence`)
      * MemoryShortage: a worker ran out of memory (`pipeline.training.out_of_memory`)
      * Postponed
        * Interrupted
          * Killed
        * BusyError
        * SlowStart: this machine was too busy to start Ray (`pipeline.cluster.ray_session`)
    * JobError, ClusterFileError: a job or a file of clusters (`jobs.errors`)
  * ShardError: raised in `shards` (`shards.errors`)
    * SourceError, DigestError, OtherFormatError, BadSampleError
  * ConfigError: raised in `detr` (`detr.config`), a ValueError

`detr` and `shards` import neither each other nor this package, so there are three roots. `USER_ERRORS` joins them:
the command line prints such an error without a traceback and exits with status 1, or 75 for `Postponed`.
"""

from __future__ import annotations

from detr.config import ConfigError
from shards.errors import ShardError


class PipelineError(Exception):
    """Base class of the errors of `pipeline` and `jobs`."""


class RunConfigError(PipelineError):
    """Raised when a run's configuration is impossible or does not fit its data."""


class CheckpointError(PipelineError):
    """Raised when a checkpoint is missing, incomplete or of another run."""


class TrackingError(PipelineError):
    """Raised when the tracking server does not answer or does not know the run."""


class TrackingAway(TrackingError):
    """Raised when the tracking server does not answer now; a later attempt may succeed."""


class RegistryError(PipelineError):
    """Raised when a registered model, version or alias does not exist or cannot be used as asked."""


class ExchangeError(PipelineError):
    """Raised when a weights file cannot be imported or a model cannot be exported as asked."""


class TrainingError(PipelineError):
    """Raised when training ended early; the message says why."""


class Postponed(TrainingError):
    """Raised when a run cannot continue now, such as without its store or cluster; the same command continues it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again


class Interrupted(Postponed):
    """Raised when a user or a scheduler stopped the run."""


class Killed(Interrupted):
    """Raised when a run was stopped by force: its workers were ended before they saved. The message says what is kept."""


class BusyError(Postponed):
    """Raised if another driver is working on the run."""


USER_ERRORS: tuple[type[Exception], ...] = (PipelineError, ConfigError, ShardError)
