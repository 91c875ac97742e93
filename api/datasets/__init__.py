"""Data sets that were uploaded to the service."""
