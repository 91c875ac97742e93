"""`python -m bench gpu`: the figures that the engine is held to on a GPU, and which of their targets are met."""
