"""Exports of checkpoints as GGUF: asked for, followed and downloaded."""
