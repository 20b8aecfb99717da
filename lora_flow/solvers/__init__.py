"""Solvers and error control for diffrax."""
