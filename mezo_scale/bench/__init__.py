"""The scale-up benchmark: MeZO and its baselines, over models, strategies and world sizes.

- cell: one combination to measure, and what the options of a sweep multiply out to
- sweep: which cells are done; the others, one after the other, a row each
- processes: a cell's ranks: started, watched, and ended when one of them fails
- measure: what runs on each rank: build, count, time, weigh
- counting: the collectives that really happen, and their bytes
- memory: the peak of a process, or of its device
- figures: what is said of a row: medians, ratios, and the planner's figure beside it
- projection: from the rates of one device to many devices, marked as such
- report: all of it as JSON, CSV and Markdown; plots draws
"""
