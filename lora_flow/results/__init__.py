"""Results: the answers, times and tables that a stored dataset gives."""
