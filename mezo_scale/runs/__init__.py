"""Runs: a recipe carried out in a run directory, evaluated, reported, verified and published."""
