"""The source of a small data set, to be damaged and written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass
class SourceFiles:
    """Images below `root`, and the content of the JSON, which a test may change before `save` writes it."""

    JSON: ClassVar[str]
    root: Path
    data: dict[str, Any]

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def annotations(self) -> Path:
        return self.root / self.JSON

    def save(self) -> Path:
        """Write the JSON and return its path."""
        self.annotations.write_text(json.dumps(self.data))
        return self.annotations
