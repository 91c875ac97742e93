"""Data sets: upload, list, get."""
