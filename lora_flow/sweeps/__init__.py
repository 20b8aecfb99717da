"""A grid of runs: its plan, its work, its run folder."""
