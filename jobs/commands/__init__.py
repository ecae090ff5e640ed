"""The subcommands of `detr`: a dataclass of flags and a function for each.

May import `jobs.submit`, `jobs.parsing`, `jobs.spec`, `pipeline` and `shards`; heavy imports stand inside
functions.
"""
