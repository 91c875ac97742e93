"""Webhooks over HTTP: endpoints, their secrets, and the log of deliveries."""
