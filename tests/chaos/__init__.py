"""The fault campaign: real services, random faults, and a verdict from intake and log alone.

`python -m tests.chaos` (or `make chaos`). CHAOS_FAULTS (40) and CHAOS_SEED (1) say how many faults
of which order; the same seed gives the same faults and prompts, not the same interleaving.
CHAOS_KINDS, names from `faults` with commas, leaves the other kinds out.
"""
