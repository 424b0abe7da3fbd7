"""Typed client of the VAE service, sync and async, and the command line `vae`."""

from vae_client.answer import Answer, Note
from vae_client.batch import Failure, Report
from vae_client.call import Accept
from vae_client.client import AsyncClient, Client
from vae_client.comparison import Comparison, compare
from vae_client.errors import ClientError, Problem
from vae_client.events import Event, Progress
from vae_client.exchange import Retries
from vae_client.images import Image, Images
from vae_client.version import VERSION

__all__ = [
    "VERSION",
    "Accept",
    "Answer",
    "AsyncClient",
    "Client",
    "ClientError",
    "Comparison",
    "Event",
    "Failure",
    "Image",
    "Images",
    "Note",
    "Problem",
    "Progress",
    "Report",
    "Retries",
    "compare",
]
