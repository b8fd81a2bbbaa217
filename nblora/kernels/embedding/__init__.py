"""Rows of tables that integers name: taken, and gradients added up where they were taken from."""
