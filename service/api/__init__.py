"""The HTTP API: request bodies, validation, memory budget, errors; its faces are packages."""
