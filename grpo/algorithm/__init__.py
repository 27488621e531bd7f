"""GRPO and its family as free functions: advantages, the batch of an update, the loss. Tensors in, tensors out."""
