"""The feature cache: outputs of frozen parts for media and captions, computed once and kept in memory-mapped shards.

`store` keeps tensors on disk, `reading` says what a store depends on and serves it to a dataset, and
`anygpt.data.caching` fills the stores.
"""
