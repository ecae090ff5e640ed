"""Files in folders and stores by URL: reads, downloads, retries, the cache of a node.

The only package that imports fsspec. May import the modules of `shards` below it.
"""
