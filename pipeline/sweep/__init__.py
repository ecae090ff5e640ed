"""Sweeps: many runs that differ in a few options, scheduled by Ray Tune.

A trial is a run like any other, with a name, that `detr train` continues. Ray Tune decides which trials run and which end
early; the process of the sweep starts and stops them. The only package beside `pipeline.cluster` that uses Ray.
"""
