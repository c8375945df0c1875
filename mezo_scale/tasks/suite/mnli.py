"""MNLI (Williams et al., 2018), posed like SNLI, whose labels it has."""

from mezo_scale.tasks.suite import snli

TASK = snli.TASK
