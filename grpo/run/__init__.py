"""What surrounds the updates of a run: preflight, checkpoints and resuming, watchdog, tripwire, post-mortem."""
