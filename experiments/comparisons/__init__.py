"""Comparisons of a service, over HTTP, with other methods: tables, pages and pictures."""
