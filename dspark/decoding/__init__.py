"""The mathematics of lossless acceptance: laws, noise, verification. Tensors in, tensors out."""
