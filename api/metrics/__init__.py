"""What the processes of the API record about themselves."""
