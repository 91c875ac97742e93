"""Checkpoints: their files, resumable and verifiable downloads."""
