"""The process: compiling, memory, signals, and progress."""
