"""From the rows of data files to samples: conversations with their reference answers.

Nothing here imports torch or transformers, so the API uses it as the engine does. This package imports nothing.
"""
