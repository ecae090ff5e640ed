"""Deaths of workers: ask for the ones that Ray has not noticed yet, and report Ray's reason for them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from shards.errors import one_line

_ASK_S = 5.0  # a call to a dead process fails within about 2 s
_ROUNDS, _PAUSE_S = 3, 0.5  # a process that is ending may answer once more


def find_dead(actors: Mapping[int, Any], timeout_s: float = _ASK_S) -> dict[int, BaseException]:
    """Ask each worker, by rank, for a sign of life; return the errors of those that are dead.

    A broken connection between workers reaches their peers seconds before Ray notices the death that broke it.
    """
    import ray

    until = time.monotonic() + timeout_s
    for round_number in range(_ROUNDS if actors else 0):
        if round_number:
            time.sleep(_PAUSE_S)
        asked = {actor.__ray_ready__.remote(): rank for rank, actor in actors.items()}
        answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=max(0.0, until - time.monotonic()))
        dead: dict[int, BaseException] = {}
        for answer in answers:
            try:
                ray.get(answer)
            except ray.exceptions.RayActorError as error:
                dead[asked[answer]] = error
        if dead or time.monotonic() > until:
            return dead
    return {}


def reason_of_death(failure: BaseException) -> str:
    """Return Ray's reason for the death of a worker's process or node, without boilerplate; "" if it lives."""
    from ray.exceptions import RayActorError

    cause = failure if isinstance(failure, RayActorError) else getattr(failure, "health_check_failure", None)
    if cause is None:
        return ""
    if type(cause).__name__ == "ActorUnavailableError":
        return "its process or its node does not answer"
    lines = [line.strip() for line in str(cause).splitlines()]
    reason = " ".join(
        line for line in lines if line and not re.match(r"\w+: ", line) and "before finishing" not in line
    )
    reason = reason.partition("Worker exit detail: ")[2] or reason
    # If Ray does not know the cause, it appends a list of guesses.
    reason, guess, _ = reason.partition(" Some common causes")
    if guess:
        reason += " It was killed, it crashed, or its machine ran out of memory (dmesg there says so)."
    return (reason or one_line(cause))[:400].rstrip(".")
