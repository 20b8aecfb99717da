"""The claims of the papers, tested on runs."""
