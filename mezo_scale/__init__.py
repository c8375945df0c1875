"""MeZO that shards."""
