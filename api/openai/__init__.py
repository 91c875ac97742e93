"""What the `openai` package calls, below `/openai/v1`: a thin translation over the functions that `/v1` uses."""
