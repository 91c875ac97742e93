"""`python -m bench scale`: the database of a large service, and thousands of workers at it, simulated."""
