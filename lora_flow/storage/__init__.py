"""Settings and results on disk. Knows nothing of what is stored."""
