"""Examples in the OpenAPI document."""

from __future__ import annotations

from typing import Any


def example(answer: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Document an answer with status 200 by an example.

    Args:
        answer: The example, as JSON.

    Returns:
        The argument `responses` of a FastAPI route.
    """
    return {200: {"content": {"application/json": {"example": answer}}}}


PROGRESS = {"step": 10, "steps": 100, "active": 1, "elbo": [-98.2]}
"""A progress event of refinement."""

PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAABUElEQVR4AWNgGLSA1XTx5cev3n94sc+ECd2RTHEvf/z69ePrpy/f7qtBJRlhiv"
    "hPKf+4funs/ff/AqIWN/wFC7PAJFnZ/v44MOPxn/8MFzlUOL+AheHGf6h/wxVrzvj////fj1TFYVpgNJPR9Z/P/YGKZc4/M4cJwmlG2Tu/n2qx"
    "G138dVoQLghnMOq8+PP0wLc/r43gQkgM5p7f//79fawJE4K7FiTAzMjI+P+t022YJBLNyJv2+M+/f6sQ6mEsRjYRxSCHH3fk2ZTg4cIAZTFKd+"
    "j8+Xph85tJ1h8VPiEZB2IyNnz/ttGbn5El+vdnKbgcLIR4WP7vPvb5/38RoEJ0yf8n/rBFmPFzKQQyfv0Kl4QxBO/9/f3uxMpL3/9shbkRJgU0"
    "y+rln39///z998kLIQhnMdlc+vXv37+vjZgagWoY+Qsv3FltwQxXTjMGAD3NgejCVQKUAAAAAElFTkSuQmCC"
)
"""A PNG of a digit, 28 x 28 pixels, in base64: examples/digit.png."""
OTHER = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAAApUlEQVR42s3SPQoCMRAF4Emia1BT2PmHrQgewNLOwuN4Ag9lb7fYKFiJjWK2FX"
    "Qh4BKZsTXFa8VpP4ZXvEf0B2c0JL0uDw7houJ9Bqy+5bhEj+7C3n6FJFizlFcIG03ZCUKXSUkIR4YCxL6SO0I1VrFAqKcqeIStCV1h5qBHRwao"
    "5lbOgnBm5EQIu+rtEeoOhQIhten2QMgv3sRkMkkpw9XzBzP9AK+2LmsMomCOAAAAAElFTkSuQmCC"
)
"""Another digit, likewise."""
SMALL = (
    "iVBORw0KGgoAAAANSUhEUgAAAA4AAAAOCAAAAAA6I3INAAAAhklEQVR42mNgwAcYGRgYGBhNLTgYjh1hYGBgZmBgYAjaoMbEln7kNQMDCwMD"
    "AwPzn6Udf5xsr8K0eL2L4FtXhzAi8/ubvTwMDAxMDAwMDAwsfGw/fL9ATeaIM+ASsJX4DVXp8j2OxeQ7LwMDxOSrf+JZPd79gBsU8envnwIk"
    "tylkWzJiczMAUwkfsqSvwLsAAAAASUVORK5CYII="
)
"""Means of the first digit's blocks of 2 x 2 pixels: examples/small.png."""
HALF = [[[1] * 28] * 14 + [[0] * 28] * 14]
"""A mask of such a picture: its lower half is missing."""
LATENT = [0.5, -0.5] * 20
"""A latent of 40 numbers, as those of `mnist`."""
