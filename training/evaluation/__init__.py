"""Evaluation on held-out images, and calibration."""
