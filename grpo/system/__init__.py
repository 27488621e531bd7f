"""The machine: processes and their collectives, signals, progress and hangs, memory, files, the terminal."""
