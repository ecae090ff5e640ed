"""The training loop of one worker and its parts: step, optimizer, guard, saves, evaluations.

May import `pipeline.display`, `evaluation`, `checkpoint`, `tracking`, `data` and what lies below; never Ray or
MLflow.
"""
