"""Quantised weights: one file per on-disk format, the layouts they have in memory, and making them."""
