"""A REST inference microservice for trained variational auto-encoders."""

__version__ = "0.1.0"
