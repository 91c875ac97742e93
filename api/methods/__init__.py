"""The knowledge-distillation methods that a job may use."""
