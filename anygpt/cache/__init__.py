"""The feature cache: what frozen parts make of media and captions, computed once and kept in memory-mapped shards.

`keys` says what a store depends on, `store` keeps tensors on disk, `reading` hands them to a dataset, which
`anygpt.data.caching` fills them from.
"""

from anygpt.cache.reading import CachedFeatures, CachedLatents, FeatureCache, StaleCache
from anygpt.cache.text_states import TextStates

__all__ = ["CachedFeatures", "CachedLatents", "FeatureCache", "StaleCache", "TextStates"]
