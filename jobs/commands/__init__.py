"""The subcommands of `detr`: a dataclass of flags and a function for each.

May import `jobs.submit`, `jobs.parsing`, `jobs.spec`, `pipeline` and `shards`. Slow packages are imported inside the
functions, after parsing, so that help is quick.
"""
