"""Administrative routes: models, loading and unloading, health, metrics, documentation."""
