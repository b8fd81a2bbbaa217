"""Rows that are copied, averaged over ranges, and searched for their largest number."""
