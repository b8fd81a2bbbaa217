"""A layer's products on NVIDIA GPUs: tiles, the forward, its gradients, and one vector by a matrix."""
