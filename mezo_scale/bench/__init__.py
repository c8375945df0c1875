"""The scale-up benchmark: MeZO and its rivals, over models, strategies and world sizes.

- sweep: a sweep file, and the cells that it multiplies out to; sweeps/ has those that are shipped
- running: which cells are done; the others, a launch each, a row each
- measure: what runs on each rank: build, count, time, weigh
- counting: the collectives that really happen, and their bytes
- rivals: MeZO as published, the same on shards, AdamW
- figures: what is said of the rows: medians, ratios, efficiency, and the planner's figure beside it
- report: all of it as JSON, CSV and Markdown; plots draws
- comparison: a file that multiplies methods by seeds and rates; comparing runs it, comparison_report has its table
"""
