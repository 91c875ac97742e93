"""Models: where they come from, how their output head is applied, and how they are saved."""
