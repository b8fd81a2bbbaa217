"""Kernels own the arithmetic. They validate nothing, allocate no more than tiles, and return nothing."""
