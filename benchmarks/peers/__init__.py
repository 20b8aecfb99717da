"""One module a library: each gives peers that solve a `Task` to a tolerance, in the fastest sensible form known."""
