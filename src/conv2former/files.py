"""Files that survive a crash, and text from anywhere, JSON or YAML, that is read within limits.

Files are written whole or not at all, and lines are read in spite of a torn one. A file of somebody else's may be made
to fill the memory, or to take for ever: its bytes, its depth, its values and the digits of its numbers are counted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 8 << 20  # of a JSON file; 22,000 classes with names and descriptions need three
MOST_PARTS = 500_000  # values in it
MOST_YAML, MOST_YAML_PARTS = 1 << 18, 20_000  # characters and, aliases written out, values; a recipe has 200
MOST_LEVELS = 32
MOST_DIGITS = 19  # of a whole number, which then fits 64 bits
MOST_LINE, MOST_LINES_BYTES = 1 << 20, 1 << 29  # of a log of JSON lines
PLAIN = re.compile(r"tag:yaml\.org,2002:(str|int|float|bool|null|seq|map|merge|value)")


def replace_text(path: Path, text: str) -> None:
    """``replace_bytes`` with a text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a file under another name, then renames it: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cause(error: BaseException) -> OSError | None:
    """What the system has refused, be it behind an error of PyTorch, which hides a full disk in a RuntimeError."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def remedy(error: BaseException) -> str:
    """What to do where a file cannot be written."""
    found = cause(error)
    if found is None or found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room"
    if found.errno in (errno.EACCES, errno.EPERM):
        return "give yourself the permission to write there"
    if found.errno == errno.EROFS:
        return "mount the disk for writing"
    return "see to it that its folder is there and can be written"


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends a line of JSON, on a new line even if a crash cut the last one short."""
    with path.open("ab+") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file, but for those that a crash cut short; none where there is no file.

    A line of more than ``MOST_LINE`` bytes is passed over, and what is behind the first ``MOST_LINES_BYTES``. A metric
    may be no number (NaN).
    """
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as file:
        while (line := file.readline(MOST_LINE)) and file.tell() <= MOST_LINES_BYTES:
            try:
                row = parse_json(line.decode(errors="replace"), finite=False)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def read_within(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's bytes; raises OSError, and ValueError where it has more than ``most``."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def parse_json(content: str | bytes, *, finite: bool = True) -> Any:
    """What a JSON text says; raises ValueError, also for what is beyond the limits above.

    NaN and infinite numbers are refused, unless ``finite`` is off.
    """
    own: Any = dict(parse_float=_finite, parse_constant=_finite) if finite else {}
    try:
        found = json.loads(content, parse_int=_whole, **own)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None
    return _limited(found, finite=finite)


def parse_yaml(text: str) -> Any:
    """What a YAML text says in the values that JSON has; dates are texts. Raises ValueError, as ``parse_json`` does."""
    if len(text) > MOST_YAML:
        raise ValueError(f"it has more than {MOST_YAML:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _parts(node, {}, 1)  # before anything is made of it: a few aliases of aliases write out to billions of values
        return _limited(loader.construct_document(node))
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None
    except yaml.MarkedYAMLError as error:  # whose own text shows the file's
        at = error.problem_mark
        raise ValueError(f"{error.problem}{f' (line {at.line + 1}, column {at.column + 1})' if at else ''}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (LookupError, TypeError, AttributeError) as error:  # a value that is not what its tag says
        raise ValueError(f"a value does not fit its tag: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with YAML 1.2's numbers (``1e-6`` is one, ``010`` is 10, ``1:30`` is none), and no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in known if not tag.endswith(("timestamp", ":int", ":float"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def whole(self, node: yaml.ScalarNode) -> int:
        """A whole number."""
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


_INT = re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole)


def _parts(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """The number of values in a YAML node, aliases written out."""
    if level > MOST_LEVELS:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
    if (count := known.get(id(node))) is not None:
        if not count:
            raise ValueError("a part of it holds itself")
        return count
    known[id(node)] = 0  # until it is counted
    if not PLAIN.fullmatch(node.tag):
        raise ValueError(f"it holds a {node.tag}, which is no plain value")
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        if twice := [key for key, number in keys.items() if number > 1]:
            raise ValueError(f"it has the key {twice[0][:80]!r} twice, of which one would be lost")
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int"):
            _few_digits(node.value)
        inner = []
    else:
        inner = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else [entry])]
    known[id(node)] = count = 1 + sum(_parts(part, known, level + 1) for part in inner)
    if count > MOST_YAML_PARTS:
        raise ValueError(f"it holds more than {MOST_YAML_PARTS:,} values")
    return count


def _limited(found: Any, *, finite: bool = True) -> Any:
    """Refuses values too deep, too many, or of no number; raises ValueError."""
    level, depth, count = [found], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        if count > MOST_PARTS:
            raise ValueError(f"it holds more than {MOST_PARTS:,} values")
        if finite and any(isinstance(part, float) and not math.isfinite(part) for part in level):
            raise ValueError("it holds a number that is not finite")
        level = [
            inner
            for part in level
            if isinstance(part, (dict, list))
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
    return found


def _whole(text: str) -> int:
    _few_digits(text)
    return int(text)


def _few_digits(text: str) -> None:
    if len(text.lstrip("+-")) > MOST_DIGITS:
        raise ValueError(f"it holds a whole number of more than {MOST_DIGITS} digits")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    return value


def output_names(files: Sequence[Path], inputs: Sequence[Path], ending: str) -> dict[Path, Path]:
    """Relative paths for what is made from image files: a folder's as they lie in it, single ones by their names.

    The ending differs from the images', because the files may go to the same folder. Images that differ by their
    endings alone keep these, so that none takes the name of another; a number tells apart what is left.
    """
    folders = {path for path in inputs if path.is_dir()}
    alike = Counter((file.parent, file.stem) for file in dict.fromkeys(files))
    names: dict[Path, Path] = {}
    taken = set[Path]()
    for file in dict.fromkeys(files):
        folder = next((parent for parent in reversed(file.parents) if parent in folders), file.parent)
        stem, number = file.name if alike[file.parent, file.stem] > 1 else file.stem, 2
        name = file.relative_to(folder).with_name(stem + ending)
        while name in taken:
            name, number = name.with_name(f"{stem}-{number}{ending}"), number + 1
        taken.add(name)
        names[file] = name
    return names
