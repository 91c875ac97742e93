"""The rivals that the product is measured against, each under conditions as favourable to it as is honest."""

PUBLISHED = "published recipe"
GKD = "TRL GKDTrainer"
DISTILLATION = "TRL DistillationTrainer"
IGNORED = -100
"""The label of a position that torch and the rivals leave out of their losses."""
