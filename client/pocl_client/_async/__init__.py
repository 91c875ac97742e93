"""The client with `await`. `python -m tools.client_twin` makes `pocl_client._sync` of it, but for `concurrency`."""
