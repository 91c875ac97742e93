"""Distillation jobs: their life, their rows and what is asked of them."""
