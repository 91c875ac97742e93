"""Delivers the messages of webhooks, in the process of the scheduler."""
