"""Trackers: where the metrics of a job go besides the service itself."""
