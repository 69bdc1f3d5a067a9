"""What the command line names: images and vocabularies."""

from __future__ import annotations

import glob
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data.datasets.vocabularies import VOCABULARIES, known_vocabulary
from ..modeling.members import Vocabulary
from ..modeling.names import clean_name
from ..modeling.word_files import read_words

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_LIST_SUFFIXES = (".csv", ".json", ".lst", ".md", ".names", ".tsv", ".txt", ".yaml", ".yml")


def tell(line: str) -> None:
    """Prints a line beside the results."""
    print(line, file=sys.stderr)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that --input names: files, globs, and folders for the images in them."""
    found: list[Path] = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        try:
            if os.path.isdir(path):
                matches = _images_in(Path(path), pattern)
            else:
                # An existing name is taken literally, brackets and all.
                names = [path] if os.path.lexists(path) else sorted(glob.glob(path))
                matches = list(map(Path, names))
        except OSError as error:
            raise SystemExit(f"error: --input {pattern}: {error}") from error
        # A folder that *.jpg happened to match is one bad input of many, not a slip.
        if not matches and len(patterns) > 1 and os.path.isdir(path):
            matches = [Path(path)]
        if not matches:
            raise SystemExit(f"error: --input {pattern!r}: there is no image.")
        found += matches
    return list(dict.fromkeys(found))


def _images_in(folder: Path, pattern: str) -> list[Path]:
    inside = sorted(folder.iterdir())
    images = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()]
    left_out = Counter(
        "folders" if p.is_dir() else p.suffix.lower() or "without ending"
        for p in inside
        if p not in set(images)
    )
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8))
        tell(
            f"--input {pattern}: {left_out.total()} of {len(inside)} entries of the folder are "
            f"left out ({kinds}); of a folder, {' '.join(sorted(IMAGE_SUFFIXES))} are read."
        )
    return images


def read_vocabulary(names: str) -> list[str] | Vocabulary:
    """The class names that --vocabulary gives, as its help says.

    Without a comma or "@", what is the name of a file means that file; a yaml file may have groups,
    hierarchies and background names. Says in one line what it understood where that may surprise.
    Raises a ValueError.
    """
    path = os.path.expanduser(names)
    if names.lower().endswith((".yaml", ".yml")) and os.path.isfile(path):
        return read_words(path)
    is_path = names.startswith(("/", "./", "../", "~"))
    if names.lower() in VOCABULARIES:
        if os.path.exists(names):
            tell(f"--vocabulary {names}: the known class names, not the file here ('./{names}').")
        return known_vocabulary(names.lower())
    if os.path.isfile(path) and (is_path or "," not in names):
        words = _read_names(path, names)
        if not is_path and not _is_list(names):
            tell(
                f"--vocabulary {names}: read as the file of that name, with {len(words)} class "
                f"names; for the word, give it with others, separated by commas."
            )
    elif is_path or (names[:1] != "@" and "," not in names and _is_list(names)):
        words = _read_names(path, names)
    else:
        words = _combined(names)
    _tell_about(words)
    return words


def _is_list(name: str) -> bool:
    return name.lower().endswith(_LIST_SUFFIXES)


def _combined(names: str) -> list[str]:
    """Words, known sets and @files, separated by commas; sets do not repeat a name."""
    parts = [part.strip() for part in names.split(",")]
    lists = {part for part in parts if part.startswith("@") or part.lower() in VOCABULARIES}
    plain = {names, *parts} - lists
    if files := [word for word in sorted(plain) if word and os.path.exists(word)]:
        tell(
            f"--vocabulary {names}: understood as words, not as what is called '{files[0]}' in "
            f"this folder (that would be './{files[0]}', or '@{files[0]}' among others)."
        )
    if not lists:
        return parts
    words: dict[str, str] = {}
    for part in parts:
        found = [part]
        if part.startswith("@"):
            found = _read_names(os.path.expanduser(part[1:]), names)
        elif part in lists:
            found = known_vocabulary(part.lower())
        for word in found:
            words.setdefault(_plain(word), word)
    sets = ", ".join(sorted(lists))
    tell(f"--vocabulary {names}: {len(words)} class names, with those of {sets}.")
    return list(words.values())


def _read_names(path: str, names: str) -> list[str]:
    if not os.path.isfile(path):
        fault = "a folder; a file is expected" if os.path.isdir(path) else "there is no such file"
        where = "" if names.removeprefix("@") == path else f" '{path}'"
        raise ValueError(f"--vocabulary {names}: {fault}{where}, with one class name per line.")
    try:
        # Some editors begin a file with a byte-order mark, which is not part of a name.
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--vocabulary {names}: byte {error.start} is not UTF-8, the expected encoding."
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    if lines and lines[0].startswith(("[", "{")):
        raise ValueError(
            f"--vocabulary {names}: begins with '{lines[0][:20]}' as json does; a text file with "
            "one class name per line is expected."
        )
    for number, line in enumerate(lines, start=1):
        if any(unicodedata.category(c) == "Cc" and c != "\t" for c in line):
            raise ValueError(f"--vocabulary {names}: line {number} has control characters.")
    if not any(lines):
        raise ValueError(f"--vocabulary {names}: the file is empty; one name per line is expected.")
    return [line for line in lines if line]


def _plain(word: str) -> str:
    """What all spellings of a name share."""
    return clean_name(unicodedata.normalize("NFKC", word).casefold().replace("-", " "))


def _tell_about(words: list[str]) -> None:
    if len(words) == 1:
        tell(f"--vocabulary has a single name, '{words[0]}': the score of every region is 1.0.")
    seen: dict[str, str] = {}
    for word in words:
        first = seen.setdefault(_plain(word), word)
        # The same letters twice are refused by the predictor.
        if clean_name(first).lower() != clean_name(word).lower():
            tell(f"--vocabulary: '{first}' and '{word}' are spellings of one name and share it.")
