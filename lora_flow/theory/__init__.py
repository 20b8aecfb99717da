"""Theory: formulas, the runs that they are tested against, and the verdicts."""
