"""The training loop of one worker and its parts: step, optimizer, guard, saves, evaluations.

May import `pipeline.display` and what lies below it; never Ray or MLflow.
"""
