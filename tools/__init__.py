"""Chores of the repository: pictures drawn from the code, and the check of its words."""
