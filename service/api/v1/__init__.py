"""The HTTP face of the operations: `POST /v1/...` and its part of the OpenAPI document."""
