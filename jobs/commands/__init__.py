"""The subcommands of `detr`: a dataclass of flags and a function for each.

May import all of `jobs` but `jobs.cli`, and `pipeline` and `shards`. Slow packages are imported inside the
functions, after parsing, so that help is quick.
"""
