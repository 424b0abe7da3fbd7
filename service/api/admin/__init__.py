"""Models, their loading, health, metrics and documentation."""
