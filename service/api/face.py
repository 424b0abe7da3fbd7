"""`Face`: what a request to an operation goes through, whatever its wire format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from starlette.types import Receive, Scope, Send

from service.api.invoke import Context
from service.api.memory import Share
from service.api.reply import WHOLE, Reply, refusal
from service.operations.operation import Operation
from service.runtime.model import Model


class Face(ABC):
    """Serves operations as an ASGI application: it gets a reply or an error, sends it, counts it, and frees memory.

    Args:
        context: The parts that all faces share.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._whole = not context.settings.tracing  # tracing ends a span at the message with the body

    @abstractmethod
    async def reply(self, scope: Scope, receive: Receive, share: Share, served: dict[str, Any]) -> Reply | None:
        """Read the request, run the operation, and write the answer.

        Args:
            scope: ASGI's.
            receive: ASGI's.
            share: The request's memory.
            served: Gets `model` and `operation`, for metrics, the access log and traces.

        Returns:
            The reply; None where the caller has disconnected before the whole request arrived.

        Raises:
            Exception: Any; it becomes an answer.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Errors are answered in the form that belongs to the path."""
        share = Share(self.context.memory)
        served: dict[str, Any] = {"model": "unknown", "operation": "unknown"}
        try:
            try:
                reply = await self.reply(scope, receive, share, served)
                if reply is None:
                    return
            except Exception as error:  # noqa: BLE001  # every error becomes an answer, and only here
                reply = refusal(error, scope["path"])
            served["outcome"], served["rows"] = reply.outcome, reply.rows
            scope["served"] = served  # for the access log and the trace
            whole = self._whole and WHOLE in scope.get("extensions", ())
            served["outcome"] = await reply.send(send, whole=whole)
            self.context.telemetry.request(**served, queue_s=reply.queue_s, inference_s=reply.inference_s)
        finally:
            share.give_back()

    def find(self, operation: Operation, name: str | None, version: str | None, served: dict[str, Any]) -> Model:
        """Find a model, which must offer the operation, and note its name in `served`.

        Raises:
            UnknownModel: There is no such model or version.
            NotReady: It is not served.
            UnsupportedOperation: It lacks what the operation needs.
        """
        served["operation"] = operation.name
        model = self.context.repository.find(name, version, operation.name)
        served["model"] = model.manifest.name
        if not model.others:
            operation.check_offered(model, self.context.repository.models)
        return model
