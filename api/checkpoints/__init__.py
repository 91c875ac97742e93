"""Checkpoints that jobs have committed to the artifact store."""
