"""Kinds of tasks: what a row is, how a model answers it, what an answer is worth."""
