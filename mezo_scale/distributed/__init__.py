"""The processes of a run: who started them, who they are, and how they begin and stop together."""
