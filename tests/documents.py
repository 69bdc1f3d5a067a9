"""The documents of the repository, and the commands in them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from .tools import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "*/README.md", "configs/**/*.md", "docs/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)

# `python`, `make` and `regionspot` note what they are given. Nothing else is found, for PATH is
# empty: bash says so. What a command substitution would have printed is the name of a photo.
_NOTE_COMMANDS = r"""
note() { { printf '%s\0' "$@"; printf '\n\0'; } >>"$NOTES"; }
python() { note python "$@"; echo photo.jpg; }
make() { note make "$@"; }
regionspot() { note regionspot "$@"; }
"""


def name_of(document: Path) -> str:
    """The path of a document from the root of the repository."""
    return document.relative_to(ROOT).as_posix()


def python_blocks(document: str) -> list[str]:
    """The Python of a document, block by block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def shell_blocks(document: Path) -> list[str]:
    """The blocks of a document that are marked as bash."""
    text = document.read_text(encoding="utf-8")
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


def commands(document: Path) -> list[tuple[str, ...]]:
    """The words of every ``python``, ``make`` and ``regionspot`` command of a document.

    They are as bash reads them.

    Besides the blocks marked as bash, these are code spans that start with a script and have
    options.
    """
    lines = shell_blocks(document)
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for span in re.findall(
        r"`((?:python |make |regionspot |tools/|demo/|train_net\.py)[^`]*)`", text
    ):
        if span.startswith(("python", "make")):
            lines.append(span)
        elif span.startswith("regionspot "):
            # Without options, a command's name rather than a command.
            lines += [span] if " -" in span or span == "regionspot models" else []
        elif " -" in span:
            lines.append(f"python {span}")
    return _read_by_bash(lines)[0]


def other_programs(document: Path) -> set[str]:
    """The programs of the bash blocks other than ``python``, ``make`` and ``regionspot``.

    What bash does itself, such as ``export``, is none of them.
    """
    return _read_by_bash(shell_blocks(document))[1]


def _read_by_bash(lines: list[str]) -> tuple[list[tuple[str, ...]], set[str]]:
    """The words of the commands whose programs are known, and the names of other programs."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.touch()
        done = subprocess.run(
            ["/bin/bash", "-c", _NOTE_COMMANDS + "\n".join(lines)],
            cwd=folder,
            env={"PATH": "", "NOTES": str(notes), "LC_ALL": "C"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        noted = notes.read_text(encoding="utf-8")
    missing = r": line \d+: (.+): (?:No such file or directory|command not found)$"
    others = set(re.findall(missing, done.stderr, flags=re.MULTILINE))
    return [tuple(command.split("\0")[:-1]) for command in noted.split("\n\0")[:-1]], others


def script_commands() -> list[tuple[str, ...]]:
    """The commands of all documents that run a script, each once and without ``python``."""
    found: dict[tuple[str, ...], None] = {}
    for document in DOCUMENTS:
        for program, *words in commands(document):
            if program == "regionspot":
                # ``regionspot name`` has the options of the demo.
                is_name = words[:1] == ["name"]
                words = ["demo/demo.py", *words[1:]] if is_name else ["regionspot_cli.py", *words]
            if program != "make" and words and words[0].endswith(".py"):
                found[tuple(words)] = None
    return list(found)


COMMANDS = script_commands()
