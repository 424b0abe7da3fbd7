"""`python -m benchmarks.peers.<name> <model folder> <port>` serves reconstruct on loopback until it is ended."""
