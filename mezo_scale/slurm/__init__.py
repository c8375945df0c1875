"""Runs as jobs of a SLURM cluster: submitted, and asked how they are getting on."""
