"""Pictures of a run. Every function takes `ax=None`, draws on it, and returns the axes it drew on."""
