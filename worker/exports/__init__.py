"""Writes checkpoints as GGUF beside the jobs of a worker, by processes that may be killed without harm."""
