"""Stores into other formats and out of them, and several stores into one."""
