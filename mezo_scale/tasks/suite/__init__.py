"""The tasks that come along, one file each: prompts and answers as in MeZO's OPT runs (Malladi et al., 2023)."""
