"""The target (any causal LM of transformers) and the DSpark drafter."""
