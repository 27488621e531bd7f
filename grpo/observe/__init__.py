"""What a run shows and writes while it goes on: metrics, sinks, the console, the run's directory."""
