"""The contract of trainer and service. Needs numpy and pydantic alone, and Pillow for the pixel conversion."""
