"""What every kernel stands on: compiling and caching, threads, vectors, the machine, per-element rules."""
