"""The use of Ray: its session, the workers and their restarts, tasks beside the training.

The only package of `pipeline` that imports Ray. May import `pipeline.registry` and what lies below it.
"""
