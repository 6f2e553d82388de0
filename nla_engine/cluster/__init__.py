"""A run on several machines, by Ray."""
