"""Forwards the metrics of jobs to trackers, from the rows, by processes that may hang without harm."""
