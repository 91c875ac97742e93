"""Pushes the students of jobs to the Hugging Face Hub, by processes that may hang without harm."""
