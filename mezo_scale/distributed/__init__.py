"""The processes of a run: who started them, who they are, how they find each other, and how they stop."""
