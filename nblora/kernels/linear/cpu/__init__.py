"""The fused linear step on the CPU: packed panels for many samples, row tiles for few."""
