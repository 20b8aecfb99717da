"""What theory says: formulas, the runs that they are held against, and the verdicts."""
