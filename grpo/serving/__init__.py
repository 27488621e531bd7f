"""An OpenAI-style server over the native rollout engine: requests join and leave the running step at any time."""
