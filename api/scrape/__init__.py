"""`/metrics`: what was recorded and read, in the Prometheus exposition format."""
