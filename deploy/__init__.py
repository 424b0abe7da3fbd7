"""What runs the service elsewhere than in its own processes."""
