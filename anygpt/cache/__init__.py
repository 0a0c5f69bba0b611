"""The feature cache: outputs of frozen parts for media and captions, computed once and kept in memory-mapped shards.

`keys` defines what a store depends on, `store` keeps tensors on disk, `reading` serves them to a dataset, and
`anygpt.data.caching` fills the stores.
"""
