"""Runs jobs: wakes up at a ring, claims a job from the database, and sees the engine through it."""
