"""What the trainer and the service both know. Needs numpy and pydantic alone, Pillow for pictures."""
