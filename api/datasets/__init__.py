"""Data sets: upload, list, get, delete."""
