"""Labels in any script, by the fonts that are installed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

from .inputs import tell

_FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def text_size(text: str, size: int) -> tuple[int, int]:
    """(width, height) of one line of text, in pixels."""
    fonts = [_loaded(_FONT, size)]
    width = 0.0
    for file, part in _runs(text):
        fonts.append(_loaded(file, size))
        width += fonts[-1].getlength(part)
    ascent = max(font.getmetrics()[0] for font in fonts)
    return -int(-width // 1), ascent + max(font.getmetrics()[1] for font in fonts)


def draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    size: int,
    fill: str | tuple[int, ...],
) -> None:
    """Draws one line of text; each letter has a font that knows it.

    Args:
        draw: the picture.
        corner: upper left, of the size that :func:`text_size` says.
        text: printable letters.
        size: of the font, in pixels.
        fill: a color, as PIL takes it.
    """
    runs = [(_loaded(file, size), part) for file, part in _runs(text)]
    fonts = [_loaded(_FONT, size), *(font for font, _ in runs)]
    x, baseline = corner[0], corner[1] + max(font.getmetrics()[0] for font in fonts)
    for font, part in runs:
        draw.text((x, baseline), part, fill=fill, font=font, anchor="ls")
        x += font.getlength(part)


def shortened(text: str, size: int, width: float) -> str:
    """The text, or as much of its beginning as fits a width in pixels, with an ellipsis."""
    if text_size(text, size)[0] <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if text_size(text[:middle] + "…", size)[0] <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits] + "…"


def font_of(text: str) -> str:
    """The file of the one font that knows most letters of a text."""
    files = dict.fromkeys([_FONT, *(file for file, _ in _runs(text))])
    return max(files, key=lambda file: len(_letters(file) & set(map(ord, text))))


@lru_cache(maxsize=4096)
def _runs(text: str) -> list[tuple[str, str]]:
    """A text in parts, each with the file of a font that knows its letters."""
    if unknown := sorted({letter for letter in text if _font_with(letter) is None}):
        _tell_once(unknown)
    return [
        (file, "".join(letters))
        for file, letters in groupby(text, lambda letter: _font_with(letter) or _FONT)
    ]


@cache
def _loaded(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


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
