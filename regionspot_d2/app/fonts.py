"""Labels in any script, by the fonts that are installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from .inputs import tell

_FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


class LabelVisualizer(Visualizer):
    """Detectron2's visualizer, but "$" is a dollar and each letter has a font that knows it."""

    def draw_text(self, text: str, position: Any, **options: Any) -> VisImage:
        output = super().draw_text(text, position, **options)
        label = output.ax.texts[-1]
        label.set_parse_math(False)
        label.set_family([_family(file) for file in fonts_of(text)])
        return output

    def picture(self) -> np.ndarray:
        """What was drawn: (H, W, 3), uint8, RGB."""
        with warnings.catch_warnings():
            # It has been said, once and with a remedy.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            return self.output.get_image()


def fonts_of(text: str) -> list[str]:
    """Files of fonts that know the letters of a text, in the order in which they are tried."""
    found = dict.fromkeys([_FONT, *filter(None, map(_font_with, text))])
    if unknown := sorted({c for c in text if _font_with(c) is None}):
        _tell_once("".join(unknown))
    return list(found)


def font_of(text: str) -> str:
    """The file of the one font that knows most letters of a text."""
    return max(fonts_of(text), key=lambda file: len(_letters(file) & set(map(ord, text))))


def _font_with(letter: str) -> str | None:
    # Fonts that matplotlib was given since are looked at too.
    return _first_font_with(letter, len(font_manager.fontManager.ttflist))


@cache
def _first_font_with(letter: str, number_of_fonts: int) -> str | None:
    # Variation selectors and joiners shape the letters beside them, and have no picture.
    if ord(letter) in _letters(_FONT) or letter.isspace() or letter in "\u200d\ufe0e\ufe0f":
        return _FONT
    return next((file for file in _installed() if ord(letter) in _letters(file)), None)


def _installed() -> list[str]:
    # Those that matplotlib was given, and those installed since it made its list.
    given = [font.fname for font in font_manager.fontManager.ttflist]
    files = dict.fromkeys([*given, *_of_the_system()])
    # Matplotlib's font of last resort "knows" every letter, as a box.
    return [file for file in files if "LastResort" not in Path(file).name]


@cache
def _of_the_system() -> list[str]:
    return sorted(font_manager.findSystemFonts())


@cache
def _letters(file: str) -> frozenset[int]:
    try:
        font = FT2Font(file)
        font.set_size(12, 72)  # which pictures of emoji, as in Noto Color Emoji, refuse
        return frozenset(font.get_charmap())
    except Exception:  # a damaged font, or of a kind that cannot be drawn
        return frozenset()


@cache
def _family(file: str) -> str:
    if all(font.fname != file for font in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(file)
    return FT2Font(file).family_name


_told: set[str] = set()


def _tell_once(letters: Iterable[str]) -> None:
    new = [letter for letter in letters if letter not in _told]
    _told.update(new)
    if new:
        shown = "".join(new[:10]).encode("unicode_escape").decode()
        tell(
            f"No installed font draws '{''.join(new[:10])}' ({shown}): pictures have boxes in "
            "their place, results.json has the names. Install a font: fonts-noto-cjk for Chinese "
            "and Japanese, fonts-noto-core for other scripts, fonts-symbola for emoji."
        )
