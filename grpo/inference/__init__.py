"""A model that is only asked: which one, loading it, a look into one group, chatting."""
