"""Tables in Markdown of the kept figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from experiments.photographs import quoted
from experiments.photographs.cases import (
    AUTO_SIGMAS,
    COLOUR,
    GREY,
    KEPT,
    RESTORED,
    SENT_SIGMAS,
    Case,
)
from experiments.photographs.figures import Figures
from experiments.photographs.methods import DRAWS, OURS, SENT
from experiments.photographs.results import Place, Results

SETS = (*GREY, *COLOUR)
ORDER = (SENT, "total variation", "non-local means", "BM3D", "biharmonic", "bicubic")
"""Measured methods of others, in the order of their rows."""
Images = dict[str, Figures]


class Tables:
    """Tables of the figures of one folder.

    Args:
        results: The figures.
        sizes: Number of images of each set, for marks where some are missing.
    """

    def __init__(self, results: Results, sizes: dict[str, int]) -> None:
        self.found = {place: results.known(place) for place in results.places()}
        self._sizes = sizes
        named = {place.method.split(" ")[1] for place in self.found if place.method.startswith(f"{OURS} ")}
        self.models = sorted(named)

    def of(self, name: str, case: str, method: str) -> Images:
        """Figures by image; empty where nothing was measured."""
        return self.found.get(Place(name, case, method), {})

    def mean(self, name: str, case: str, method: str, figure: str, form: str = ".2f") -> str:
        """Format the mean over the images; with their number where some of the set are missing; "" without any."""
        images = self.of(name, case, method)
        values = [one[figure] for one in images.values() if figure in one]
        return self.shown(fmean(values), name, len(values), form) if values else ""

    def shown(self, value: float, name: str, count: int, form: str) -> str:
        """Format a number, with the number of images behind it where some of the set are missing."""
        return format(value, form) + (f" ({count})" if count != self._sizes.get(name, count) else "")

    def noise(self, name: str, sigmas: Sequence[float]) -> list[str]:
        """PSNR and SSIM of one set under noise of known level, beside quoted figures."""
        cases = [f"Gaussian {sigma:g}" for sigma in sigmas]
        rows, own = [], self._ours("", " auto", " refined")
        for method in (*ORDER, *own):
            psnr, ssim = (
                [self.mean(name, case, method, figure, form) for case in cases]
                for figure, form in (("psnr_db", ".2f"), ("ssim", ".3f"))
            )
            rows.append([f"**{method}**" if method.startswith(OURS) else method, *psnr, *ssim])
        for method, three in quoted.PSNR[name].items():
            known = dict(zip(quoted.SIGMAS, three, strict=True))
            values = ["" if known.get(sigma) is None else f"{known[sigma]:.2f}" for sigma in sigmas]
            rows.insert(len(rows) - len(own), [f"*quoted:* {method}", *values, *("" for _ in sigmas)])
        head = ["", *(f"PSNR {sigma:g}" for sigma in sigmas), *(f"SSIM {sigma:g}" for sigma in sigmas)]
        return table(head, rows)

    def ahead(self, name: str, sigmas: Sequence[float], model: str) -> str:
        """Name the methods with a higher PSNR than a model's, by noise, with the differences in dB.

        Measured methods are compared on the images that both have, quoted ones where the whole set is measured.
        """
        parts = []
        for sigma in sigmas:
            case = f"Gaussian {sigma:g}"
            mine = self.of(name, case, f"{OURS} {model}")
            gains = {method: _gain(self.of(name, case, method), mine) for method in ORDER}
            if sigma in quoted.SIGMAS and mine and len(mine) == self._sizes.get(name):
                own, index = fmean(one["psnr_db"] for one in mine.values()), quoted.SIGMAS.index(sigma)
                three = {f"{method} (quoted)": figures[index] for method, figures in quoted.PSNR[name].items()}
                gains |= {method: value - own for method, value in three.items() if value is not None}
            above = sorted((gain, method) for method, gain in gains.items() if gain > 0.0)
            if mine:
                said = ", ".join(f"{method} by {gain:.2f}" for gain, method in above)
                parts.append(f"at {sigma:g} {said or 'none'}")
        return "; ".join(parts)

    def intervals(self, sigmas: Sequence[float]) -> list[str]:
        """Coverage of the 90 % intervals, by set and noise."""
        rows = []
        for model in self.models:
            for name in SETS:
                cells = [self._covered(name, f"Gaussian {sigma:g}", model, "") for sigma in sigmas]
                wide = [self._covered(name, f"Gaussian {sigma:g}", model, "uncertain_") for sigma in sigmas]
                rows.append([f"{model}, {name}", *cells, *wide])
        every, uncertain = ([f"{kind}, {sigma:g}" for sigma in sigmas] for kind in ("all pixels", "std above 0.01"))
        return table(["", *every, *uncertain], rows)

    def blocks(self, sigmas: Sequence[float]) -> list[str]:
        """Variance of the means of 8 x 8 blocks between draws, over their squared error; and PSNR of draws."""
        rows = []
        for model in self.models:
            for name in SETS:
                images = [self.of(name, f"Gaussian {sigma:g}", f"{OURS} {model} draws") for sigma in sigmas]
                ratio = [self._ratio(one, name, ("block_drawn",)) for one in images]
                whole = [self._ratio(one, name, ("block_drawn", "block_within")) for one in images]
                rows.append([f"{model}, {name}", *ratio, *whole])
        heads = (f"{kind}, {sigma:g}" for kind in ("draws", "with the pixels' own") for sigma in sigmas)
        return table(["", *heads], rows)

    def draws(self, sigmas: Sequence[float]) -> list[str]:
        """PSNR of one draw, of the mean of several and of the restored image."""
        rows = []
        kinds = (("draw_db", "one draw"), ("mean_of_draws_db", f"mean of {DRAWS}"), ("psnr_db", "E[x given y]"))
        for model in self.models:
            for name in SETS:
                method = f"{OURS} {model} draws"
                cells = [self.mean(name, f"Gaussian {s:g}", method, figure) for figure, _ in kinds for s in sigmas]
                rows.append([f"{model}, {name}", *cells])
        return table(["", *(f"{kind}, {sigma:g}" for _, kind in kinds for sigma in sigmas)], rows)

    def auto(self) -> list[str]:
        """PSNR with estimated level minus that with the known one, and error of the estimate, by noise and set."""
        rows = []
        for model in self.models:
            for sigma in AUTO_SIGMAS:
                case = f"Gaussian {sigma:g}"
                cells = [self._against_told(name, case, model, sigma / 255.0) for name in SETS]
                rows.append([f"{model}, {sigma:g}", *(text for pair in cells for text in pair)])
        return table(["", *(f"{name} {kind}" for name in SETS for kind in ("dB", "level"))], rows)

    def worse(self) -> list[str]:
        """Count images that are worse than what was sent, over all levels, by set; and the least gain."""
        rows = []
        for method in self._ours("", " auto"):
            cells = []
            for name in SETS:
                gains = [gain for s in SENT_SIGMAS for gain in _gains(self.of(name, f"Gaussian {s:g}", method))]
                worse = sum(gain < 0.0 for gain in gains)
                cells += [f"{worse} of {len(gains)}" if gains else "", f"{min(gains):.2f}" if gains else ""]
            rows.append([method, *cells])
        return table(["", *(f"{name} {kind}" for name in SETS for kind in ("worse", "least gain, dB"))], rows)

    def kept(self) -> list[str]:
        """PSNR of the answer to an image that has nothing to remove, mean and least, and how much detail stays."""
        rows = []
        for model in self.models:
            for case in (*KEPT, RESTORED):
                cells = []
                for name in SETS:
                    images = self.of(name, case, f"{OURS} {model} auto").values()
                    values = [one["psnr_db"] for one in images]
                    shown = self.shown(fmean(values), name, len(values), ".2f") if values else ""
                    detail = f"{fmean(one['detail'] for one in images):.3f}" if values else ""
                    cells += [shown, f"{min(values):.2f}" if values else "", detail]
                rows.append([f"{model}, {case}", *cells])
        return table(["", *(f"{name} {kind}" for name in SETS for kind in ("dB", "least", "detail"))], rows)

    def real(self, cases: Iterable[Case], name: str = "CBSD68") -> list[str]:
        """PSNR of what is sent, and the gain of the answer without a told level: mean, least, and images that lose."""
        rows = []
        for case in cases:
            row = [case.name, self.mean(name, case.name, SENT, "psnr_db")]
            for model in self.models:
                images = self.of(name, case.name, f"{OURS} {model} auto")
                gains = _gains(images)
                shown = self.shown(fmean(gains), name, len(gains), "+.2f") if gains else ""
                worse = sum(gain < 0.0 for gain in gains)
                row += [shown, f"{min(gains):+.2f}" if gains else "", f"{worse}" if gains else ""]
            rows.append(row)
        return table(["", "sent", *(f"{m}: {k}" for m in self.models for k in ("gain", "least", "worse"))], rows)

    def filled(self, cases: Iterable[Case], rival: str, names: Sequence[str] = GREY) -> list[str]:
        """PSNR of a rival and of ours, by case and set."""
        rows = []
        for case in cases:
            cells = []
            for name in names:
                methods = (rival, *self._ours("", " refined"))
                cells += [self.mean(name, case.name, method, "psnr_db") for method in methods]
            rows.append([case.name, *cells])
        return table(
            ["", *(f"{name}: {method}" for name in names for method in (rival, *self._ours("", " refined")))], rows
        )

    def _ours(self, *kinds: str) -> list[str]:
        return [f"{OURS} {model}{kind}" for model in self.models for kind in kinds]

    def _covered(self, name: str, case: str, model: str, kind: str) -> str:
        images = [one for one in self.of(name, case, f"{OURS} {model}").values() if f"{kind}counted" in one]
        counted = sum(one[f"{kind}counted"] for one in images)
        if not counted:
            return ""
        return self.shown(sum(one[f"{kind}covered"] for one in images) / counted, name, len(images), ".3f")

    def _ratio(self, images: Images, name: str, parts: tuple[str, ...]) -> str:
        if not images:
            return ""
        error = fmean(one["block_error"] for one in images.values())
        variance = fmean(sum(one[part] for part in parts) for one in images.values())
        return self.shown(variance / max(error, 1e-12), name, len(images), ".2f")

    def _against_told(self, name: str, case: str, model: str, level: float) -> tuple[str, str]:
        told, auto = (self.of(name, case, f"{OURS} {model}{kind}") for kind in ("", " auto"))
        both = [(told[image], auto[image]) for image in told if image in auto]
        if not both:
            return "", ""
        difference = fmean(b["psnr_db"] - a["psnr_db"] for a, b in both)
        errors = [abs(b["level"] / level - 1.0) for _, b in both if "level" in b]
        shown = f"{fmean(errors):.1%}" if errors else ""
        return self.shown(difference, name, len(both), "+.2f"), shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table in Markdown. Rows and columns without any number are left out.

    Args:
        head: Names of the columns, the first one of the rows' names.
        rows: A name and the cells of each row.

    Returns:
        Its lines and an empty one; one line that says so if nothing is left.
    """
    full = [row for row in rows if any(row[1:])]
    columns = [k for k in range(len(head)) if k == 0 or any(row[k] for row in full)]
    if not full:
        return ["Not measured yet.", ""]
    lines = ["| " + " | ".join(row[k] for k in columns) + " |" for row in (head, *full)]
    return [lines[0], "|---|" + "--:|" * (len(columns) - 1), *lines[1:], ""]


def _gain(images: Images, than: Images) -> float:
    """Mean difference in PSNR on the images that both have; 0 without any."""
    both = images.keys() & than.keys()
    return fmean(images[name]["psnr_db"] - than[name]["psnr_db"] for name in both) if both else 0.0


def _gains(images: Images) -> list[float]:
    return [one["psnr_db"] - one["sent_db"] for one in images.values() if "sent_db" in one]
