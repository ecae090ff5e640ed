"""Use of a registered version: evaluate it, predict with it, serve it.

May import `pipeline.registry` and what lies below it; `serve` and `detector` only what a served version lists as
its requirements.
"""
