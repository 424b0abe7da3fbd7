"""The model card of a version: its README.md, written from the manifest alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.contract.manifest import CARD_FILE, Card, File, Manifest, digest
from training.config import CardNotes
from training.data import KINDS
from training.errors import ConfigError
from training.files import write_whole

SHEET_FILE = "sheet.png"
URL = "http://127.0.0.1:8000/v1/models"
NOT_STATED = "Not stated."
NOT_FOR = (
    "Images of another kind than the training images: it brings them closer to those that it knows. Evidence of any "
    "kind: a restored pixel is an estimate, and a sample shows nothing that exists."
)
UNKNOWN_DATA = "Known to the one who trained the model; this card has no further word on them."
COLUMNS = ("noisy", "restored", "auto")
"""Figures of a row of the restoration's table."""
USUAL = ("images", "seed", "importance_samples", "test_nll_", "test_elbo_")
"""Beginnings of the figures that the card names in words."""


def renewed(manifest: Manifest, folder: Path) -> Manifest:
    """Write the card of a version anew where it has one, after its manifest has changed.

    Args:
        manifest: The manifest that is about to be written.
        folder: Folder of the version.

    Returns:
        The manifest with the digest of the new card.

    Raises:
        ConfigError: The manifest's words for the card are unusable.
        DiskError: The card cannot be written.
    """
    return manifest if manifest.card is None else with_card(manifest, folder, manifest.card.pictures)


def with_card(manifest: Manifest, folder: Path, pictures: list[File]) -> Manifest:
    """Write the card of a version into its folder.

    Args:
        manifest: The manifest, whose own entry of a card does not matter.
        folder: Folder of the version.
        pictures: The pictures that the card shows, which are there already.

    Returns:
        The manifest with the card.

    Raises:
        ConfigError: The manifest's words for the card are unusable.
        DiskError: The card cannot be written.
    """
    content = text(manifest, [picture.file for picture in pictures]).encode()
    write_whole(folder / CARD_FILE, content)
    card = Card(file=CARD_FILE, sha256=digest(content), pictures=pictures)
    return manifest.model_copy(update={"card": card})


def text(manifest: Manifest, pictures: Sequence[str] = ()) -> str:
    """The card in Markdown.

    Args:
        manifest: The version's manifest; what `training` has under `card` are the words of the TOML's table.
        pictures: File names of the pictures.
    """
    notes = _notes(manifest)
    known = KINDS.get(manifest.dataset)
    data = notes.data or (known.about if known else "") or UNKNOWN_DATA
    licence = notes.data_licence or (known.licence if known else "") or NOT_STATED
    parts = [
        f"# {manifest.name}, version {manifest.version}",
        _what(manifest),
        *(f"![Images and what the model makes of them]({name})" for name in pictures),
        "## What it is for",
        notes.purpose or f"Images like those that it was trained on. It {_list([*_abilities(manifest)])}.",
        "## What it is not for",
        notes.not_for or NOT_FOR,
        "## Data and licences",
        f"- Training images: {data}\n- Their licence: {licence}\n- Licence of the model: {notes.licence or NOT_STATED}",
        "## Figures",
        "\n".join(_figures(manifest)) or "None were measured.",
        *_restoration(manifest.quality.get("restoration")),
        *_of_variants(manifest.quality),
        "## Limits",
        "\n".join([*([f"- {notes.limits}"] if notes.limits else []), *_limits(manifest)]),
        "## How to call it",
        "```sh\n" + "\n".join(_calls(manifest)) + "\n```",
        f"Latents belong to the fingerprint `{manifest.fingerprint}`. `manifest.json` has all settings and figures.",
    ]
    return "\n\n".join(parts) + "\n"


def _notes(manifest: Manifest) -> CardNotes:
    try:
        return CardNotes.model_validate(manifest.training.get("card", {}))
    except ValidationError as error:
        keys = ", ".join(CardNotes.model_fields)
        raise ConfigError(f"training.card in the manifest must be an object of texts under the keys {keys}") from error


def _what(manifest: Manifest) -> str:
    """One sentence on the model, and one on its training."""
    every = [one.channels for one in (manifest, *manifest.variants)]
    colours = " or ".join(map(colour_of, every))
    parts = [f"{' x '.join(map(str, manifest.latent_shape))} latents"]
    parts += [
        f"the {kind} `{name}`"
        for kind, name in (("prior", manifest.prior), ("likelihood", manifest.likelihood))
        if name
    ]
    source = f" (data set `{manifest.dataset}`)" if manifest.dataset else ""
    count, stages = _number(manifest.training, "train_images"), manifest.training.get("seconds")
    minutes = sum(v for v in stages.values() if isinstance(v, float)) / 60.0 if isinstance(stages, dict) else 0.0
    trained = (
        f" It was trained on {count:,} images{f' in {minutes:.0f} minutes' if minutes >= 1.0 else ''}." if count else ""
    )
    kind = "conditional variational auto-encoder" if "restoration" in manifest.graphs else "variational auto-encoder"
    return f"A {kind} of {colours} images of {_size(manifest)}{source}: {', '.join(parts)}.{trained}"


def colour_of(channels: int) -> str:
    """A number of channels in words."""
    return {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")


def _size(manifest: Manifest) -> str:
    _, height, width = manifest.input_shape
    return f"{height} x {width} pixels" if isinstance(height, int) and isinstance(width, int) else "any size"


def _abilities(manifest: Manifest) -> Iterator[str]:
    encodes, decodes = bool({"encoder", "posterior"} & manifest.graphs.keys()), "decoder" in manifest.graphs
    if encodes:
        yield "encodes images"
    if decodes:
        yield "reconstructs images" if encodes else "decodes latents"
    if decodes and manifest.prior:
        yield "draws samples"
    if "recognition" in manifest.graphs:
        yield f"restores images (noise: {', '.join(manifest.noise_families)}; missing pixels, lower resolution, blur)"
    if "restoration" in manifest.graphs:
        noise = ", ".join(manifest.noise_families)
        yield f"restores images (noise: {noise}; missing pixels, lower resolution)"
        yield "draws what they may have been"
    if "log_joint" in manifest.graphs:
        yield "scores how likely an image is"


def _list(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _figures(manifest: Manifest) -> Iterator[str]:
    """One line a figure, with its standard error and what it was measured on."""
    quality = manifest.quality
    images, draws = _number(quality, "images"), _number(quality, "importance_samples")
    on = f"{'' if images is None else f'{images:,} '}test images"
    binarised = f", binarisation: {quality['binarisation']}" if "binarisation" in quality else ""
    drawn = "" if draws is None else f", {draws:,} importance samples an image"
    if (nats := _with_error(quality, "test_nll")) is not None:
        yield f"- Negative log likelihood on {on}: at most {nats}{drawn}{binarised}."
    if (nats := _with_error(quality, "test_elbo")) is not None:
        yield f"- Evidence lower bound on {on}: {nats}{binarised}."
    for name, meaning in (("test_nll", "Negative log likelihood"), ("test_elbo", "Negative evidence lower bound")):
        if (bits := _number(quality, f"{name}_bits_per_dim")) is not None:
            yield f"- {meaning}: {bits:g} bits a pixel and channel."
    if manifest.calibration is not None:
        factors = [
            *(value for one in manifest.calibration.factors.values() for value in one.values()),
            *(
                value
                for one in manifest.calibration.curves.values()
                for curve in one.values()
                for value in curve.factors
            ),
        ]
        yield (
            f"- `std` of restored pixels: calibrated on {manifest.calibration.images} validation images, by factors "
            f"from {min(factors):g} to {max(factors):g}, so that mean +- 1.645 `std` holds nine pixels in ten."
        )
    for name in quality:
        if not name.startswith(USUAL) and (value := _number(quality, name)) is not None:
            yield f"- `{name}`: {value:g}."


def _number(figures: Mapping[str, Any], name: str) -> float | None:
    """A figure that other programs may have left out or written otherwise."""
    value = figures.get(name)
    return value if isinstance(value, (int, float)) else None


def _with_error(quality: Mapping[str, Any], name: str) -> str | None:
    """A figure in nats, +- its standard error over the images where that is known."""
    value, error = _number(quality, f"{name}_nats"), _number(quality, f"{name}_standard_error_nats")
    return None if value is None else f"{value:g}{'' if error is None else f' +- {error:g}'} nats an image"


def _of_variants(quality: Mapping[str, Any]) -> Iterator[str]:
    """Sections with the figures of each variant, for models whose `quality` has a table for each."""
    for variant, figures in quality.items():
        if not isinstance(figures, dict) or "restoration" not in figures:
            continue
        yield f"### {variant.capitalize()}"
        if (images := _number(figures, "images")) is not None:
            yield f"On {images:,} test images."
        if (nats := _number(figures, "gain_by_latents_nats_per_pixel")) is not None:
            yield f"The latents raise the bound on log p(x | y) by {nats:g} nats a pixel, at a noise of 25/255."
        yield from _restoration(figures["restoration"])


def _restoration(table: Any) -> Iterator[str]:
    """The table of restored test images; nothing where there is none, as the trainer writes it."""
    rows = [
        f"| {family} | {level} | {' | '.join(_decibels(row, name) for name in COLUMNS)} | {row['worse']:.1%} |"
        for family, levels in (table if isinstance(table, dict) else {}).items()
        for level, row in (levels if isinstance(levels, dict) else {}).items()
        if isinstance(row, dict) and {"worse", *(f"{name}_db" for name in COLUMNS)} <= row.keys()
    ]
    if rows:
        yield "Restored test images, mean PSNR in dB, +- its standard error over the images where that was measured:"
        head = "| noise | level | noisy | restored | restored, level estimated | images made worse |"
        yield "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _decibels(row: Mapping[str, float], name: str) -> str:
    error = row.get(f"{name}_standard_error_db")
    return f"{row[f'{name}_db']:.1f}" + ("" if error is None else f" +- {error:.1f}")


def _limits(manifest: Manifest) -> Iterator[str]:
    yield f"- It takes images of {_size(manifest)}."
    yield "- Reconstructions and restored images are means, so they are smoother than photographs or scans."
    if {"recognition", "restoration"} & manifest.graphs.keys():
        yield "- It restores corruptions like the simulated ones. A wrong `level` or `noise` makes the answer worse."
        if manifest.calibration is None:
            yield "- The `std` of restored pixels is not calibrated."
    if "log_joint" in manifest.graphs:
        yield "- A likelihood does not measure whether an image is of the training images' kind."


def _calls(manifest: Manifest) -> Iterator[str]:
    """One command for each of the main operations."""
    url, fit = f"{URL}/{manifest.name}", "" if _size(manifest) == "any size" else "?fit=crop"
    calls = (
        ("draws samples", "-X POST", "sample?count=16", "samples.png"),
        ("reconstructs images", "-F file=@image.png", f"reconstruct{fit}", "reconstruction.png"),
        ("restores images", "-F file=@noisy.png", f"denoise{fit}", "restored.png"),
    )
    abilities = " ".join(_abilities(manifest))
    for ability, what, path, out in calls:
        if ability in abilities:
            yield f"curl -sSf {what} '{url}/{path}' -H 'Accept: image/png' -o {out}"
    yield f"curl -sSf '{url}'"
