"""The rivals that the product is measured against, each under conditions as favourable to it as is honest."""

PUBLISHED = "published recipe"
GKD = "TRL GKDTrainer"
DISTILLATION = "TRL DistillationTrainer"
