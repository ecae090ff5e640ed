"""A data set on disk or in a store: manifest, index, categories, tars, and its verification.

May import `shards.store` and the modules of `shards` below it.
"""
