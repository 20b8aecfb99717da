"""How problems are drawn or read."""
