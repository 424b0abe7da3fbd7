"""The operations under /v1."""
