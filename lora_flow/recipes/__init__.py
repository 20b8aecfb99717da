"""Recipes: functions that draw or read problems."""
