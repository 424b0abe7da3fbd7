"""Errors that stop a run; each message names the fix."""

from __future__ import annotations


class TrainingError(Exception):
    """Base class: the command line prints its message as one line and exits with 1."""


class ConfigError(TrainingError):
    """The TOML cannot be used."""


class DataError(TrainingError):
    """The data are missing, unreadable or outside [0, 1]."""


class ModelFileError(TrainingError):
    """A statistical model's Python file cannot be used."""


class DivergedError(TrainingError):
    """The bound is no longer finite."""


class DiskError(TrainingError):
    """A file cannot be written."""


class CheckpointError(TrainingError):
    """There is no checkpoint, or it belongs to other settings."""


class ExportError(TrainingError):
    """The exported graphs do not compute what the trained model computes."""


class SigningError(TrainingError):
    """A version cannot be signed: the private key is unusable, or the files are not as the manifest says."""


class ServiceError(TrainingError):
    """The service under test does not start or does not answer."""


class RefusedError(ServiceError):
    """The service refused a request; `code` is the problem's."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class DependencyError(TrainingError):
    """An optional package is not installed."""
