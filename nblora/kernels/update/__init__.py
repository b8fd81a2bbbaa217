"""In-place updates of parameters, and merging."""
