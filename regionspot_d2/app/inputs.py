"""What the command line names: images and vocabularies."""

from __future__ import annotations

import glob
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.datasets.vocabularies import VOCABULARIES, known_vocabulary
from ..modeling.members import Vocabulary
from ..modeling.names import clean_name
from ..modeling.word_files import read_words
from .own_outputs import OwnOutputs

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_OWN = "of an earlier run"
_LIST_SUFFIXES = (".csv", ".json", ".lst", ".md", ".names", ".tsv", ".txt", ".yaml", ".yml")


def tell(line: str) -> None:
    """Prints a line beside the results."""
    print(line, file=sys.stderr)


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that --input names: files, globs, and folders for all images in and below them.

    What an earlier run wrote is left out, but not a file that is all that is named.
    """
    found: list[Path] = []
    own = OwnOutputs()
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        try:
            if os.path.isdir(path):
                matches = images_below(path, f"--input {pattern}", own)
            elif os.path.lexists(path) and len(patterns) == 1:
                matches = [Path(path)]
            else:
                matches = _files_of(path, pattern, own)
        except OSError as error:
            raise SystemExit(f"error: --input {pattern}: {error}") from error
        # A folder that *.jpg happened to match is one bad input of many, not a slip.
        if not matches and len(patterns) > 1 and os.path.isdir(path) and path not in own:
            matches = [Path(path)]
        found += matches
    if not found:
        raise SystemExit(f"error: --input {' '.join(map(repr, patterns))}: there is no image.")
    return list(dict.fromkeys(found))


def _files_of(path: str, pattern: str, own: OwnOutputs) -> list[Path]:
    """One file of several, as a shell makes them of *.jpg, or those of a glob."""
    # An existing name is taken literally, brackets and all.
    names = [path] if os.path.lexists(path) else sorted(glob.glob(path))
    if not names:
        raise SystemExit(f"error: --input {pattern!r}: there is no image.")
    drawn = {name for name in names if name in own}
    if drawn:
        tell(f"--input {pattern}: {len(drawn)} of {len(names)} left out ({_OWN}).")
    return [Path(name) for name in names if name not in drawn]


def input_folders(patterns: Sequence[str]) -> list[Path]:
    """Those that --input names; results keep the folders inside them."""
    return [Path(path) for path in map(os.path.expanduser, patterns) if os.path.isdir(path)]


def images_below(folder: str, option: str, own: OwnOutputs) -> list[Path]:
    """The images in a folder and in those inside it, sorted, first those of the outer folder.

    Args:
        folder: its path.
        option: what the command line says of it, for the line about what is left out.
        own: outputs of earlier runs, which are left out.

    Raises:
        OSError: the folder cannot be read. Of one inside it, a line tells that.
    """
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in _files_below(folder, option):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            left_out[path.suffix.lower() or "without ending"] += 1
        elif path in own:
            left_out[_OWN] += 1
        else:
            images.append(path)
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8))
        total = left_out.total()
        tell(
            f"{option}: {total} of {total + len(images)} entries of the folder are "
            f"left out ({kinds}); of a folder, {' '.join(sorted(IMAGE_SUFFIXES))} are read."
        )
    return images


def _files_below(folder: str, option: str) -> Iterator[Path]:
    known = set()

    def tell_of(error: OSError) -> None:
        if error.filename == folder:
            raise error
        tell(f"{option.split()[0]}: {error.filename} cannot be read: {error.strerror}.")

    for place, folders, files in os.walk(folder, onerror=tell_of, followlinks=True):
        # A link may lead back to a folder that it is in.
        state = os.stat(place)
        is_known = (state.st_dev, state.st_ino) in known
        known.add((state.st_dev, state.st_ino))
        # Hidden folders are those of programs: thumbnails, versions, the trash.
        folders[:] = [] if is_known else sorted(f for f in folders if not f.startswith("."))
        yield from () if is_known else (Path(place, name) for name in sorted(files))


def read_vocabulary(names: str, *, is_all: bool = True) -> list[str] | Vocabulary:
    """The class names that --vocabulary gives, as its help says.

    Without a comma or "@", what is the name of a file means that file; a yaml file may have groups,
    hierarchies and background names. Says in one line what it understood where that may surprise,
    and with ``is_all``, if no other names join them, that there is a single one. Raises a
    ValueError.
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
    if is_all:
        tell_if_single(words, "--vocabulary")
    _tell_of_spellings(words)
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
            words.setdefault(plain_name(word), word)
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


def plain_name(word: str) -> str:
    """What all spellings of a name share."""
    return clean_name(unicodedata.normalize("NFKC", word).casefold().replace("-", " "))


def tell_if_single(words: list[str], option: str) -> None:
    """Says in one line that scores mean nothing if there is one name, which ``option`` gave."""
    if len(words) == 1:
        tell(f"{option} has a single name, '{words[0]}': the score of every region is 1.0.")


def _tell_of_spellings(words: list[str]) -> None:
    seen: dict[str, str] = {}
    for word in words:
        first = seen.setdefault(plain_name(word), word)
        # The same letters twice are refused by the predictor.
        if clean_name(first).lower() != clean_name(word).lower():
            tell(f"--vocabulary: '{first}' and '{word}' are spellings of one name and share it.")
