"""The parts of the loop: a collector of scored groups, a learner that makes updates, and where a run stands."""
