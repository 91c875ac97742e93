"""The client package and its command."""
