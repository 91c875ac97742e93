"""The client without `await`. `python -m tools.client_twin` makes it of `pocl_client._async`, but for `concurrency`."""
