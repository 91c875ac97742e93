"""Knowledge-distillation losses of the response tokens.

`pocl.losses.divergence` is a function here; the module of the same name is reached by
`from pocl.losses.divergence import ...`.
"""

from pocl.losses.dense import divergence

__all__ = ["divergence"]
