"""Published figures of other methods, which are not measured here."""

from __future__ import annotations

Triple = tuple[float | None, float | None, float | None]

SIGMAS = (15.0, 25.0, 50.0)
"""Noise of the three figures of each row, in 255ths."""

PSNR: dict[str, dict[str, Triple]] = {
    "Set12": {
        "BM3D": (32.37, 29.97, 26.72),
        "WNNM": (32.70, 30.28, 27.05),
        "DnCNN-S": (32.86, 30.44, 27.18),
        "FFDNet": (32.75, 30.43, 27.32),
        "DRUNet": (33.25, 30.94, 27.90),
        "SwinIR": (33.36, 31.01, 27.91),
    },
    "BSD68": {
        "BM3D": (31.08, 28.57, 25.60),
        "WNNM": (31.37, 28.83, 25.87),
        "TNRD": (31.42, 28.92, 25.97),
        "DnCNN-S": (31.73, 29.23, 26.23),
        "DnCNN-B, blind": (31.61, 29.16, 26.23),
        "FFDNet": (31.63, 29.19, 26.29),
        "DRUNet": (31.91, 29.48, 26.59),
        "SwinIR": (31.97, 29.50, 26.58),
        "Noise2Void, from noisy images alone": (None, 27.71, None),
        "HDN, from noisy images alone": (None, 28.70, None),
    },
    "CBSD68": {
        "CBM3D": (33.52, 30.71, 27.38),
        "CDnCNN": (33.90, 31.24, 27.95),
        "FFDNet": (33.87, 31.21, 27.96),
        "VDN": (33.90, 31.35, 28.19),
        "DRUNet": (34.30, 31.69, 28.51),
        "SwinIR": (34.42, 31.78, 28.56),
    },
    "Kodak24": {
        "CBM3D": (34.28, 31.68, 28.46),
        "CDnCNN": (34.60, 32.14, 28.95),
        "FFDNet": (34.63, 32.13, 28.98),
        "DRUNet": (35.31, 32.89, 29.86),
        "SwinIR": (35.34, 32.89, 29.79),
    },
    "McMaster": {
        "CBM3D": (34.06, 31.66, 28.51),
        "CDnCNN": (33.45, 31.52, 28.62),
        "FFDNet": (34.66, 32.35, 29.18),
        "DRUNet": (35.40, 33.14, 30.08),
        "SwinIR": (35.61, 33.20, 30.22),
    },
}
"""PSNR in dB by set and method, for the three `SIGMAS`.

Sources: the tables of SwinIR (Liang et al., 2021) and of FFDNet's and DnCNN's repositories (Zhang et al.); VDN (Yue et
al., 2019); Noise2Void and HDN from the table of HDN (Prakash et al., 2022).
"""
