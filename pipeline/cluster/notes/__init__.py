"""Notes that driver, workers and Ray's controller leave for each other while a run is trained.

They are in the key-value store of the Ray cluster, so nothing depends on a file that several nodes see. Imports no Ray.
"""
