"""Panoptic segmentation: predictions to segments that cover an image.

May import `detr.variant` and what lies below it.
"""

from detr.panoptic.segments import PanopticResult as PanopticResult
from detr.panoptic.segments import Segment as Segment
from detr.panoptic.segments import panoptic as panoptic
