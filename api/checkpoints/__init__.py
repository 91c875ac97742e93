"""Checkpoints that jobs have committed to the artefact store."""
