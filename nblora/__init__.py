"""LoRA and Delta-LoRA adapters on NumPy arrays, trained and merged by fused Numba kernels."""
