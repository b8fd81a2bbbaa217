"""Normalisation of rows: LayerNorm and RMSNorm."""
