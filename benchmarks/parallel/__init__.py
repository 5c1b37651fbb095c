"""Parallel plans on emulated links."""
