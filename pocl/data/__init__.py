"""Data: rows of JSONL to samples (`records`), samples to prompts (`prompting`) and token batches (`batches`).

`records` imports neither torch nor transformers, so the API may use it. This package imports nothing.
"""
