"""From a file of texts to an adapter."""
