"""The operations of the service, each a method with its options; and what a service tells of itself and its models.

The methods make requests, and the class that inherits them sends these: `Client`, `AsyncClient` and their streams share
the signatures.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, Generic, Literal, TypeAlias, TypeVar, Unpack

import numpy as np

from vae_client.answer import Answer
from vae_client.call import Call, Common, model_path, operation_call
from vae_client.errors import InvalidRequest
from vae_client.images import Array, Images, files_of

T = TypeVar("T")
Json = TypeVar("Json")
Text = TypeVar("Text")

Fit = Literal["resize", "pad", "crop"]
TileFit = Literal["resize", "pad", "crop", "tile"]
Noise = Literal["gaussian", "poisson", "salt-and-pepper", "masking", "processed", "none", "auto"]
Quality = Literal["fast", "refined"]
Latents: TypeAlias = Array | Answer
"""Latents, (n, *latent); or an answer of `encode`, whose means and fingerprint go to its model."""

NAMES = (
    "encode",
    "decode",
    "reconstruct",
    "denoise",
    "inpaint",
    "super-resolve",
    "score",
    "sample",
    "interpolate",
    "traverse",
)
"""Names of the operations in paths; the methods have underscores in place of hyphens."""


class Operations(ABC, Generic[T]):
    """The operations. Every method also takes the keyword arguments of `Common`: model, version, accept, timeout_s."""

    @abstractmethod
    def perform(self, call: Call) -> T:
        """Send the request of an operation; the methods below call this."""

    def encode(
        self,
        images: Images,
        *,
        draws: int = 0,
        seed: int | None = None,
        fit: Fit | None = None,
        scale: str | None = None,
        noise: Noise | None = None,
        level: float | Literal["auto"] = "auto",
        **common: Unpack[Common],
    ) -> T:
        """Images to their posterior: `mean` and `log_var` (log sigma squared) of q(z|x), `latents` with `draws`.

        Args:
            images: Images.
            draws: Posterior draws an image.
            seed: Seed of the draws; the answer names the one it used.
            fit: How images of another size are brought to the model's: stretched, with black added, or cut.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            noise: Kind of the noise of the images; only for a conditional model.
            level: Its level likewise; auto estimates it.
            **common: See `Common`.
        """
        return self._ask("encode", locals())

    def decode(
        self, latents: Latents, *, channels: int | None = None, fingerprint: str | None = None, **common: Unpack[Common]
    ) -> T:
        """Latents to images, E[x|z].

        Args:
            latents: Latents, (n, *latent), or an answer of `encode`.
            channels: Channels of the images, of a model that has variants for several.
            fingerprint: Fingerprint of the model that encoded the latents; another model refuses them.
            **common: See `Common`.
        """
        return self._ask("decode", locals())

    def reconstruct(
        self,
        images: Images,
        *,
        draws: int = 0,
        seed: int | None = None,
        fit: Fit | None = None,
        scale: str | None = None,
        **common: Unpack[Common],
    ) -> T:
        """Images encoded and decoded, at the posterior's mean or averaged over `draws` from it.

        Args:
            images: Images.
            draws: Posterior draws an image; 0 uses the posterior's mean.
            seed: Seed of the draws; the answer names the one it used.
            fit: How images of another size are brought to the model's: stretched, with black added, or cut.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            **common: See `Common`.
        """
        return self._ask("reconstruct", locals())

    def denoise(
        self,
        images: Images,
        *,
        mask: Images | None = None,
        noise: Noise | None = None,
        level: float | Literal["auto"] = "auto",
        blur: float | None = None,
        quality: Quality = "fast",
        draws: int = 0,
        seed: int | None = None,
        uncertainty: bool | Literal["map"] = False,
        completions: bool = False,
        preview: bool = False,
        fit: TileFit | None = None,
        scale: str | None = None,
        **common: Unpack[Common],
    ) -> T:
        """Noisy images restored, E[x|y].

        Args:
            images: Noisy images.
            mask: 1 where a pixel is seen, 0 where it is missing; one for all images or one an image.
            noise: Kind of the noise; auto finds it, none is for a mask or a blur alone.
            level: Level of the noise, for images in [0, 1]; auto estimates it.
            blur: Standard deviation, in pixels, of a Gaussian blur of the images before the noise.
            quality: fast is one pass; refined takes longer and is usually better.
            draws: Posterior draws that are averaged; 0 uses the posterior's mean.
            seed: Seed of what is drawn; the answer names the one it used.
            uncertainty: Whether the answer has `std` for each pixel; map makes a PNG a heat map of it.
            completions: Whether the answer has the image of every draw.
            preview: Whether progress events have the images so far.
            fit: How images of another size are brought to the model's; tile works larger ones off in tiles.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            **common: See `Common`.
        """
        return self._ask("denoise", locals())

    def inpaint(
        self,
        images: Images,
        *,
        mask: Images | None = None,
        noise: Noise | None = "none",
        level: float | Literal["auto"] = "auto",
        blur: float | None = None,
        quality: Quality = "fast",
        draws: int = 0,
        seed: int | None = None,
        uncertainty: bool | Literal["map"] = False,
        completions: bool = False,
        preview: bool = False,
        fit: TileFit | None = None,
        scale: str | None = None,
        **common: Unpack[Common],
    ) -> T:
        """Images with missing pixels completed.

        Args:
            images: Images; the transparency of a picture file may be its mask.
            mask: 1 where a pixel is seen, 0 where it is missing; one for all images or one an image.
            noise: Kind of the noise on the pixels that are seen.
            level: Level of the noise, for images in [0, 1]; auto estimates it.
            blur: Standard deviation, in pixels, of a Gaussian blur of the images before the noise.
            quality: fast is one pass; refined takes longer and is usually better.
            draws: Posterior draws that are averaged; 0 uses the posterior's mean.
            seed: Seed of what is drawn; the answer names the one it used.
            uncertainty: Whether the answer has `std` for each pixel; map makes a PNG a heat map of it.
            completions: Whether the answer has the image of every draw.
            preview: Whether progress events have the images so far.
            fit: How images of another size are brought to the model's; tile works larger ones off in tiles.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            **common: See `Common`.
        """
        return self._ask("inpaint", locals())

    def super_resolve(
        self,
        images: Images,
        *,
        mask: Images | None = None,
        factor: int = 2,
        level: float = 0.0,
        quality: Quality = "fast",
        draws: int = 0,
        seed: int | None = None,
        uncertainty: bool | Literal["map"] = False,
        completions: bool = False,
        preview: bool = False,
        fit: Fit | None = None,
        scale: str | None = None,
        **common: Unpack[Common],
    ) -> T:
        """Small images enlarged: each pixel that is sent is the mean of factor x factor pixels of the answer.

        Args:
            images: Small images.
            mask: 1 where a pixel is seen, 0 where it is missing; one for all images or one an image.
            factor: How much larger the answer's height and width are.
            level: Standard deviation of Gaussian noise on what is sent.
            quality: fast is one pass; refined takes longer and is usually better.
            draws: Posterior draws that are averaged; 0 uses the posterior's mean.
            seed: Seed of what is drawn; the answer names the one it used.
            uncertainty: Whether the answer has `std` for each pixel; map makes a PNG a heat map of it.
            completions: Whether the answer has the image of every draw.
            preview: Whether progress events have the images so far.
            fit: How images of another size are brought to the model's: stretched, with black added, or cut.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            **common: See `Common`.
        """
        return self._ask("super-resolve", locals())

    def score(
        self,
        images: Images,
        *,
        draws: int = 16,
        seed: int | None = None,
        quality: Quality = "fast",
        binarise: Literal["sample", "threshold", "none"] | None = None,
        error: bool = False,
        fit: Fit | None = None,
        scale: str | None = None,
        **common: Unpack[Common],
    ) -> T:
        """How likely images are under the model, in nats: `elbo` and its terms, `importance_weighted`, `percentile`.

        Args:
            images: Images.
            draws: Posterior draws an image, over which the figures are averages.
            seed: Seed of the draws; the answer names the one it used.
            quality: refined continues with variational inference for each image.
            binarise: How grey levels become black and white, for a model of binary pixels.
            error: Whether the answer has the squared error of each pixel.
            fit: How images of another size are brought to the model's: stretched, with black added, or cut.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            **common: See `Common`.
        """
        return self._ask("score", locals())

    def sample(
        self,
        *,
        count: int = 1,
        height: int | None = None,
        width: int | None = None,
        channels: int | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        latents: bool = False,
        **common: Unpack[Common],
    ) -> T:
        """New images, of the prior.

        Args:
            count: Number of images.
            height: Their height, of a model whose images may have any size.
            width: Their width likewise.
            channels: Channels of the images, of a model that has variants for several.
            seed: Seed of the draws; the answer names the one it used.
            temperature: Scale of the prior's noise; less than 1 gives more typical images.
            latents: Whether the answer has the latents too.
            **common: See `Common`.
        """
        return self._ask("sample", locals())

    def interpolate(
        self,
        images: Images | None = None,
        *,
        between: Latents | None = None,
        steps: int = 8,
        path: Literal["spherical", "linear"] = "spherical",
        latent_walk: bool = False,
        fit: Fit | None = None,
        scale: str | None = None,
        channels: int | None = None,
        fingerprint: str | None = None,
        **common: Unpack[Common],
    ) -> T:
        """Images on the way from one image to another, or between two latents.

        Args:
            images: Two images.
            between: Two latents in place of images, or an answer of `encode` of two images.
            steps: Number of images, the two ends included.
            path: Way of the latents: an arc, or a line.
            latent_walk: Whether the answer has the latents on the way.
            fit: How images of another size are brought to the model's: stretched, with black added, or cut.
            scale: Black and white of picture files, as in 0,4095; auto is the least and the largest number.
            channels: Channels of the images, of a model that has variants for several.
            fingerprint: Fingerprint of the model that encoded the latents; another model refuses them.
            **common: See `Common`.
        """
        if (images is None) == (between is None):
            raise InvalidRequest("interpolate takes two images or, with between, two latents; name one of them")
        return self._ask("interpolate", locals())

    def traverse(
        self,
        *,
        axes: str = "0,1",
        size: int = 10,
        height: int | None = None,
        width: int | None = None,
        channels: int | None = None,
        seed: int | None = None,
        latents: bool = False,
        **common: Unpack[Common],
    ) -> T:
        """Images over a grid of one or two latents of the prior.

        Args:
            axes: One axis of the latents, or two with a comma: the first runs to the right, the second up.
            size: Images along each axis.
            height: Their height, of a model whose images may have any size.
            width: Their width likewise.
            channels: Channels of the images, of a model that has variants for several.
            seed: Seed of the draw of the prior that the axes go through; its mean without one.
            latents: Whether the answer has the latents too.
            **common: See `Common`.
        """
        return self._ask("traverse", locals())

    def _ask(self, operation: str, given: Mapping[str, Any]) -> T:
        """Make the request of a method and send it. Options that have their default are the service's to choose.

        Args:
            operation: Name of the operation.
            given: All arguments of its method, as `locals()` has them.

        Raises:
            InvalidRequest: One of them is neither an option nor in `Common`.
        """
        usual, common = options_of(operation), given["common"]
        unknown = common.keys() - Common.__annotations__
        if unknown:
            known = ", ".join([*usual, *Common.__annotations__])
            raise InvalidRequest(f"{operation} has no option {', '.join(sorted(unknown))}; it has {known}")
        chosen = {name: given[name] for name, option in usual.items() if given[name] != option.default}
        inputs = {name: value for name, value in given.items() if name not in usual and value is not None}
        array = latents = inputs.get("latents", inputs.get("between"))
        if isinstance(latents, Answer):
            array = latents.mean
            chosen.setdefault("fingerprint", latents.fingerprint)
            if common.get("model") is None:
                common = {**common, "model": latents.model, "version": latents.version}
        elif latents is not None:
            array = np.asarray(latents)
        files, masks = (files_of(inputs[name]) if name in inputs else [] for name in ("images", "mask"))
        return self.perform(operation_call(operation, chosen, common, files, masks, array))


INPUTS = {"self", "images", "mask", "latents", "between", "common"}
"""Arguments of the methods that are no options; but `latents` of `sample` and `traverse` is one."""


@cache
def options_of(operation: str) -> Mapping[str, inspect.Parameter]:
    """The options of an operation by name, with their types and defaults."""
    found = inspect.signature(method_of(operation), eval_str=True).parameters
    return {
        name: one
        for name, one in found.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY and (name not in INPUTS or isinstance(one.default, bool))
    }


def method_of(operation: str) -> Any:
    """The method of an operation.

    Raises:
        InvalidRequest: There is no such operation.
    """
    if operation.replace("_", "-") not in NAMES:
        raise InvalidRequest(f"there is no operation {operation!r}; the operations are {', '.join(NAMES)}")
    return getattr(Operations, operation.replace("-", "_"))


class Administration(ABC, Generic[Json, Text]):
    """What a service tells of itself and of its models, and loading of models."""

    @abstractmethod
    def _json(self, call: Call) -> Json:
        """Send a request that is answered in JSON."""

    @abstractmethod
    def _text(self, call: Call) -> Text:
        """Send a request that is answered in text."""

    def models(self) -> Json:
        """Describe every model at its latest version: the list `models`."""
        return self._json(Call(method="GET", path="/v1/models"))

    def model(self, model: str, version: str | None = None) -> Json:
        """Describe a model: shapes, operations, measured quality, fingerprint and more.

        Args:
            model: Its name.
            version: One of its versions; by default the latest.
        """
        return self._json(Call(method="GET", path=model_path(model, version)))

    def card(self, model: str, version: str | None = None) -> Text:
        """The model card in Markdown.

        Args:
            model: Name of the model.
            version: One of its versions; by default the latest.
        """
        return self._text(Call(method="GET", path=f"{model_path(model, version)}/card"))

    def live(self) -> Json:
        """Ask whether the service runs."""
        return self._json(Call(method="GET", path="/health/live"))

    def ready(self, model: str | None = None, version: str | None = None, *, timeout_s: float | None = None) -> Json:
        """Ask whether the service, or a model of it, is ready. `NotReady` says why not, after the retries.

        Args:
            model: Name of a model; by default the service as a whole.
            version: One of its versions.
            timeout_s: Seconds until the answer must be there.
        """
        path = "/health" if model is None else model_path(model, version)
        return self._json(Call(method="GET", path=f"{path}/ready", timeout_s=timeout_s))

    def load(self, model: str, version: str | None = None) -> Json:
        """Load a model: the versions that the service's settings select, read again, or one version.

        Args:
            model: Its name.
            version: One of its versions.
        """
        return self._json(Call(method="POST", path=f"{model_path(model, version)}/load"))

    def unload(self, model: str, version: str | None = None) -> Json:
        """Unload a model, or one of its versions.

        Args:
            model: Its name.
            version: One of its versions.
        """
        return self._json(Call(method="POST", path=f"{model_path(model, version)}/unload"))
