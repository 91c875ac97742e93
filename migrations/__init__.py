"""The database's schema, as a chain of steps from the empty database."""
