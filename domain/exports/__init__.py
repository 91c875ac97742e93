"""Exports: a checkpoint written as GGUF after the fact."""
