"""Processes and connections: everything that knows uvicorn's insides."""
