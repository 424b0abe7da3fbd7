"""Metrics, request ids, access log, logging, traces."""
