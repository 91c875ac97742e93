"""Jobs: submit, validate, poll, follow, act on them, and get their results."""
