"""Errors of jobs on clusters, each one line: got, expected, what to do."""

from __future__ import annotations

from pipeline.errors import PipelineError


class JobError(PipelineError):
    """Raised if a job cannot be sent, a cluster does not answer, or it knows no such job."""


class ClusterFileError(PipelineError):
    """Raised for a mistake in a file that describes clusters."""
