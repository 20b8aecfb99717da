"""What a stored dataset says."""
