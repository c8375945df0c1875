"""The baselines: what else a model is fitted to a task by, on the splits and by the metric of a MeZO run.

- setting: what all of them are given, and what they give back
- icl, linear_probe, adamw: one each; without any of them the result is the zero-shot one
- session: what goes on around them, from the model to the report
"""
