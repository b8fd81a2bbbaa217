"""The fused linear step: products of samples, weights, factors and deltas, forward and back."""
