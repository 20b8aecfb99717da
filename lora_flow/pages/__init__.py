"""Pages to look at results in a browser: one file each, which needs no server and no network."""
