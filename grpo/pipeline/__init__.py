"""grpo r1: stages that hand models and rows on to each other, each a process of its own, with a record of what came from what."""
