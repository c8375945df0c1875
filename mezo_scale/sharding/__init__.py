"""From a model that somebody sharded to its `Layout`. One adapter per kind of storage; kinds may be mixed in one model.

An adapter owes three things: recognise its kind, say what this rank stores, drop stale gathered copies after a write.
Gathering a whole parameter follows from what the ranks store. A kind that nobody recognises is an error, never taken
for a plain tensor.
"""

from mezo_scale.sharding.discovery import discover, shards
from mezo_scale.sharding.shard import Layout, Runs, Shard, Site

__all__ = ["Layout", "Runs", "Shard", "Site", "discover", "shards"]
