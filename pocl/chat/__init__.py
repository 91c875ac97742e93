"""Conversations with a model, one answer at a time: `python -m pocl.chat` is the process that a worker asks."""
