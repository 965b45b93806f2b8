"""The index-building programs."""
