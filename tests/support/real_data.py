"""Folders of real data that tests use where they exist."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
COCO_TINY = Path(os.environ.get("DETR_COCO_TINY", ROOT / "../shared/data/coco-tiny"))
"""160 images of COCO with their annotations."""
GOLDEN = Path(os.environ.get("DETR_GOLDEN", ROOT / "../shared/golden"))
"""Figures that the original's code gave."""
