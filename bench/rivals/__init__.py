"""What the product is measured against, each as favourable to it as can honestly be done."""

PUBLISHED = "published recipe"
GKD = "TRL GKDTrainer"
DISTILLATION = "TRL DistillationTrainer"
