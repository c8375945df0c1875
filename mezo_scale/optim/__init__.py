"""How a step learns: losses of branches, the record that follows from them, and its update of the shards."""
