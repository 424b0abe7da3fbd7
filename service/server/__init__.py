"""Processes, sockets and connections: everything that touches the insides of uvicorn and Starlette."""
