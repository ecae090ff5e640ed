"""Plans of checkpoints: made at the first save of an attempt and used again, because they do not change within it.

Otherwise rank 0 unpickles and merges the plans of all ranks at every save, while its training thread waits for the
interpreter: 3.8 s of CPU for 64 ranks of a ResNet-50, measured.
"""

from __future__ import annotations

import secrets

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner


class Plans:
    """Plans of one `Saver`. torch keeps them for the process; here two savers do not see each other's."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(8)

    def planner(self) -> DefaultSavePlanner:
        """Return the planner of the next save."""
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self._key
        return planner

    def forget(self) -> None:
        """Make new plans at the next save: after an error, which may have left some ranks with plans and others without.

        Every rank must call it, or none.
        """
        for kept in (
            SavePlanner._cached_save_plan,
            SavePlanner._cached_final_save_plan,
            SavePlanner._cached_all_plans,
            SavePlanner._cached_global_plan,
            SavePlanner._cached_metadata,
        ):
            kept.pop(self._key, None)
