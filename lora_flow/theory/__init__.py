"""Formulas of the papers: pure functions."""
