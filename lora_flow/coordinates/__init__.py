"""Coordinates in which an equal problem costs less."""
