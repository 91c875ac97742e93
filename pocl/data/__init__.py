"""From lines of JSONL to samples (`samples`), to prompts (`prompting`), to token ids and batches (`batches`).

`samples` imports neither torch nor transformers, so the API may use it. This package imports nothing.
"""
