"""Many images without HTTP: an operation over folders and tables, on this machine's processes or on Ray."""
