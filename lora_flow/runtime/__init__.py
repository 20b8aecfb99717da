"""What the process does: compile, count its memory, stop on a signal, say how far it is."""
