"""Restored photographs and micrographs of a service, measured over HTTP beside other methods."""
