"""Retention policies: what is deleted when, and what would be deleted now."""
