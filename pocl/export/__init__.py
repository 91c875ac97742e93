"""What leaves a run: a directory that transformers and serving stacks load, and that says what it is."""
