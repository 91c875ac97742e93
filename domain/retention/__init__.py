"""Retention policies: how long a project and its jobs keep what they made."""
