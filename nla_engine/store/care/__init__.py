"""Verifying a store, and repairing a damaged one."""
