"""Files on disk: whole or absent, readable without trust. Knows arrays and JSON, nothing of layers."""
