"""MeZO in loops that somebody else wrote. Nothing here is imported by the rest of the package."""
