"""From samples to prompts (`prompting`), to token ids and batches (`batches`). This package imports nothing."""
