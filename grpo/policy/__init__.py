"""The model: weights and tokenizer, packed forward passes, log-probabilities, adapters, the frozen reference."""
