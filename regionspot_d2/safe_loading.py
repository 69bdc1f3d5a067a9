"""Pickles, yaml and json from anywhere, read without running what they ask for."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
from collections import Counter
from reprlib import repr as shown  # short, however long or deep a value is
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

_MAX_BYTES = 1_000_000
_MAX_NODES = 100_000
_MAX_CONFIGS = 100
_MAX_DIGITS = 4300  # of a number, as Python itself has it; "1:1:1..." (base 60) escapes that
# The only expression in the configs of Detectron2's model zoo (Base-RetinaNet.yaml), and its value.
_RETINANET = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"
_RETINANET_SIZES = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


class UnsafePickleError(ValueError):
    """A pickle asks for more than arrays and plain containers; nothing of it was run."""


def _latin1(text: str, encoding: str) -> bytes:
    """The one use that pickles make of ``_codecs.encode``; other codecs take hours for a page."""
    if encoding != "latin1":
        raise UnsafePickleError(f"it asks for the encoding {shown(encoding)}")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """``bytes()``; with a number, it would fill as much memory."""
    return b""


class _PlainUnpickler(pickle.Unpickler):
    """Admits only what NumPy needs to rebuild an array; containers and numbers need no class."""

    _ADMITTED = {
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy.core.numeric": ("_frombuffer",),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),  # of NumPy 2
        "numpy._core.numeric": ("_frombuffer",),
        "collections": ("OrderedDict",),
    }
    # How Python 3 pickles bytes for Python 2, and how it pickles them if there are none.
    _BYTES = {("_codecs", "encode"): _latin1, ("__builtin__", "bytes"): _no_bytes}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._BYTES:
            return self._BYTES[module, name]
        if name not in self._ADMITTED.get(module, ()):
            raise UnsafePickleError(
                f"it asks for {module}.{name}; only NumPy arrays and plain containers are admitted"
            )
        return super().find_class(module, name)


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a pickle of NumPy arrays and plain containers, such as Detectron2's proposals.

    Args:
        path: a file, or a path that Detectron2's ``PathManager`` can open.

    Raises:
        UnsafePickleError: it asks for anything else; nothing was run.
        ValueError: it is not a file, not a pickle, or damaged.
    """
    local = PathManager.get_local_path(os.fspath(path))
    if os.path.exists(local) and not os.path.isfile(local):  # reading a pipe may never end
        raise ValueError(f"'{os.fspath(path)}' is not a file.")
    with open(local, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        _check_memo(content)
        # latin1: Python 2 wrote the oldest of these files.
        return _PlainUnpickler(content, encoding="latin1").load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"'{os.fspath(path)}' is not safe to open: {error}.") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(repr(error).split())
        raise ValueError(f"'{os.fspath(path)}' is not a pickle, or damaged: {reason}") from error


def _check_memo(content: io.BytesIO) -> None:
    """Refuses places in the memo beyond the file's length: eight bytes can ask for gigabytes."""
    length = len(content.getbuffer())
    for opcode, place, _ in pickletools.genops(content):
        memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if memo and isinstance(place, int) and place > length:
            raise ValueError(f"it numbers an object {place}")
    content.seek(0)


def read_json(json_file: str, *, unique_keys: bool = True) -> Any:
    """Reads a json file in one of json's encodings, with or without a byte order mark.

    Args:
        json_file: a file, or a path that Detectron2's ``PathManager`` can open.
        unique_keys: whether to refuse objects that have a key twice, of which json takes the last.

    Raises:
        FileNotFoundError: it does not exist, or is a folder, a pipe or a device.
        ValueError: it is not json, or is nested too deeply.
    """
    encoding = json_encoding(json_file)
    try:
        with PathManager.open(json_file, "r", encoding=encoding) as file:
            return json.load(file, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        reason = "its brackets are nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not {encoding}; save it as UTF-8"
    except ValueError as error:  # also a number of thousands of digits
        reason = str(error).split("; use sys")[0]
    raise ValueError(f"{json_file} is not a json file: {reason}.")


def json_encoding(json_file: str) -> str:
    """The encoding of a json file by its first bytes: "utf-8", "utf-8-sig", "utf-16-le", ..."""
    if "://" not in json_file and not os.path.isfile(json_file):  # reading a pipe may never end
        raise FileNotFoundError(f"{json_file}: there is no such file.")
    with PathManager.open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} is there {count} times in one object")
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for input that nobody vouches for."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > _MAX_NODES:
            raise ValueError(f"it holds more than {_MAX_NODES} values")
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(keys) > len(set(keys)):  # yaml would take the last, and forget the others
            [(key, count)] = Counter(keys).most_common(1)
            place = f"in the section at line {node.start_mark.line + 1}"
            raise ValueError(f"the key {shown(key)} is there {count} times {place}")
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > _MAX_DIGITS:
            raise ValueError(f"a number exceeds the limit of {_MAX_DIGITS} digits")
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)

    def expression(self, node: yaml.Node) -> Any:
        """Detectron2 would evaluate any; this knows what one of them gives."""
        if isinstance(node, yaml.SequenceNode) and self.construct_sequence(node) == [_RETINANET]:
            return [list(sizes) for sizes in _RETINANET_SIZES]
        raise ValueError(f"it asks for {node.tag.rpartition(':')[2]}; code in a config is not run")

    def numbers(self, node: yaml.Node) -> tuple[Any, ...]:
        """What older versions of yacs write for a tuple."""
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError("python/tuple is not followed by a list")
        return tuple(self.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.expression)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.numbers)


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values of a document, each counted as often as aliases repeat it; endless for a loop."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # if it comes back before it is counted
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        nodes = [each for pair in children for each in pair] if pairs else children
        known[id(node)] = 1 + sum(_size(each, known) for each in nodes)
    return known[id(node)]


def read_plain_yaml(path: str, what: str) -> Any:
    """Reads plain values from a yaml file or URL; ``what`` it is, for the message.

    Raises:
        ValueError, yaml.YAMLError: it asks for more than plain values, or is too large.
        OSError: the file is missing.
    """
    path = os.path.expanduser(path)
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"{what} file '{path}' does not exist")
    with PathManager.open(path, "rb") as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes, which is no {what}")
    return yaml.load(text, _Loader)


def read_yaml(
    path: str, *, bases: bool = True, _inside: tuple[str, ...] = (), _read: list[str] | None = None
) -> dict[str, Any]:
    """Reads a config and those that its ``_BASE_`` names: files, or URLs.

    Args:
        path: a file or a URL.
        bases: whether there may be a ``_BASE_``, which can name any file and any URL.

    Raises:
        ValueError, yaml.YAMLError: it is not a config, or asks for more than plain values.
        OSError: a file is missing.
    """
    path = os.path.expanduser(path)
    if path in _inside:
        raise ValueError(f"_BASE_ leads from '{path}' back to itself")
    content = read_plain_yaml(path, "config")
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"one {type(content).__name__}"
        raise ValueError(
            f"this is not a config file, which maps keys to values: '{path}' holds {found}"
        )
    _check_keys(content)
    if "_BASE_" in content and not bases:
        raise ValueError("it has a _BASE_; here a config has to be whole")
    read = [] if _read is None else _read
    read.append(path)
    if len(read) > _MAX_CONFIGS:  # a few files that name each other twice stand for billions
        raise ValueError(f"_BASE_ leads to more than {_MAX_CONFIGS} configs")
    named = content.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in named if isinstance(named, list) else [named]:
        if not isinstance(base, str):
            raise ValueError(f"_BASE_ holds {base!r}; expected a file or a list of files")
        base = os.path.expanduser(base)
        if "://" not in base:
            base = os.path.normpath(os.path.join(os.path.dirname(path), base))
        _update(merged, read_yaml(base, _inside=(*_inside, path), _read=read))
    _update(merged, content)
    return merged


def _check_keys(content: dict[Any, Any]) -> None:
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {str(key)[:50]} is not text")
        if isinstance(value, dict):
            _check_keys(value)


def _update(config: dict[str, Any], other: dict[str, Any]) -> None:
    """Detectron2's inheritance: sections are merged, values replaced."""
    for key, value in other.items():
        if isinstance(value, dict) and key in config:
            if not isinstance(config[key], dict):
                raise ValueError(f"{key} is a section here and a value in _BASE_")
            _update(config[key], value)
        else:
            config[key] = value
