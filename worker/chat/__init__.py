"""Conversations with models: a worker without a job answers them by a process that keeps its models loaded."""
