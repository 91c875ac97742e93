"""Knowledge-distillation losses: what the student is charged for each response token.

`pocl.losses.divergence` is a function here; the module of the same name is reached by
`from pocl.losses.divergence import ...`.
"""

from pocl.losses.objective import divergence

__all__ = ["divergence"]
