"""Data: rows of JSONL to samples (`samples`), samples to prompts (`prompting`) and token batches (`batches`).

`samples` imports neither torch nor transformers, so the API may use it. This package imports nothing.
"""
