"""Matrices with structure."""
