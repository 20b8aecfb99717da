"""What the papers say, tried on runs."""
