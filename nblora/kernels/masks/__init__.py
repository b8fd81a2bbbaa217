"""Masks of dropout."""
