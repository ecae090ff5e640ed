"""Everything that speaks to Ray: the session, the workers, their restarts, tasks beside the training.

The only package of `pipeline` that imports Ray. May import `pipeline.registry`, `pipeline.training` and what lies
below.
"""
