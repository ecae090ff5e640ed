"""Every tag that a run has in MLflow."""

from __future__ import annotations

TAG_FOLDER = "detr.folder"
TAG_TOTAL_STEPS = "detr.total_steps"
TAG_EPOCHS = "detr.epochs"
TAG_TRAIN_DIGEST = "detr.train_digest"
TAG_STREAM = "detr.stream_changes"
TAG_IMPORTED = "detr.imported_from"
TAG_COMMIT = "mlflow.source.git.commit"
TAG_WARNING = "detr.warning"
"""Run tag: last warning, such as a store that does not answer. A cause with a tag of its own (this name, a dot and the
cause) sets it to an empty text when it has passed."""
TAG_DATA_WAIT = f"{TAG_WARNING}.data_wait"
TAG_PHASE = "detr.phase"
"""Run tag: current phase of the run."""
TAG_RESIZED = "detr.resized"
"""Run tag: last change of the number of workers because the cluster had resources for more."""
TAG_LEFT_OUT = "detr.left_out"
"""Run tag: training images that are skipped."""
TAG_ROOM = f"{TAG_WARNING}.room"
TAG_PROGRESS = "detr.progress"
