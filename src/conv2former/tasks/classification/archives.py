"""Labelled images in tar files, each read by its place in the file: archives of class folders, webdataset shards."""

from __future__ import annotations

import errno
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from timm.data.readers.reader_image_in_tar import extract_tarinfos

from conv2former.data.folders import find_splits, is_junk
from conv2former.data.images import IMAGE_EXTENSIONS, MAX_FILE_BYTES, MAX_PIXELS, BadImage, decode
from conv2former.data.recognise import images_and_masks, refuse_masks, refuse_parts
from conv2former.data.sources import MOST_OF_A_NAME, class_lines, in_order, plain_names
from conv2former.errors import UserError, attempt, one_line
from conv2former.files import MOST_BYTES, MOST_DIGITS, parse_json
from conv2former.tasks.classification.sources import numbered

MAX_OPEN = 128
"""Tar files that a process keeps open; ImageNet-22k as one tar per class would take 21,841."""

Piece = tuple[int, str, int, int]  # which file, name in it, offset and size in bytes


class ArchiveSource:
    """Images that are pieces of uncompressed tar files.

    What is known of an image is held in arrays, some 20 bytes and its name, because there may be fourteen million. Each
    process opens the files itself and reads with ``pread``: a file's position, which processes would share after a
    fork, plays no part.

    Args:
        root: What to call the whole in messages.
        files: The tar files.
        labels: What the names of a file's images begin with, for each file.
        pieces: The images, in their order.
    """

    classes: list[str]
    targets: list[int]

    def __init__(self, root: Path, files: Sequence[Path], labels: Sequence[str], pieces: Iterable[Piece]) -> None:
        self.root, self.files, self.labels = root, list(files), list(labels)
        self._file, self._offset, self._size, self._name_end = array("i"), array("q"), array("q"), array("q", [0])
        self._names = bytearray()
        for file, name, offset, size in pieces:
            self._file.append(file)
            self._offset.append(offset)
            self._size.append(size)
            self._names += os.fsencode(name)
            self._name_end.append(len(self._names))
        self._open: dict[int, Any] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._file)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(_open={})

    def load(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        name = f"{self.files[self._file[index]]}/{self._member(index)}"
        try:
            content = self._read(index)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # too many open files are not the image's fault
                raise
            raise BadImage(name, error.strerror or str(error)) from None
        if len(content) < min(self._size[index], MAX_FILE_BYTES + 1):
            raise BadImage(name, "the tar file has become shorter since it was opened")
        return decode(content, name=name, max_pixels=max_pixels)

    def name(self, index: int) -> str:
        """The image's path in its tar file, behind the label of that."""
        return self.labels[self._file[index]] + self._member(index)

    def _member(self, index: int) -> str:
        return os.fsdecode(bytes(self._names[self._name_end[index] : self._name_end[index + 1]]))

    def _read(self, index: int) -> bytes:
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        number = self._file[index]
        file = self._open.get(number)
        if file is None:
            if len(self._open) == MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = self._open[number] = open(self.files[number], "rb", buffering=0)  # noqa: SIM115
        # one byte more than decode takes is enough for it to refuse the image
        return os.pread(file.fileno(), min(self._size[index], MAX_FILE_BYTES + 1), self._offset[index])


class TarSource(ArchiveSource):
    """Class folders in a tar file, or a folder of tar files: one per class, named by it, or with class folders within.

    timm's tar reader finds the images, in tar files inside a tar file as well. Order and classes are those that
    `FolderSource` gives for the same files unpacked.

    Args:
        root: A tar file, or a folder of tar files.

    Raises:
        UserError: No tar file, or one that is damaged, holds no images, or images that have no class.
    """

    def __init__(self, root: Path) -> None:
        files = [root] if root.is_file() else tar_files(root)
        if not files:
            raise UserError(f"no tar files in {root}: class folders are read with --set data.source=folder")
        labels = [""] if root.is_file() else [f"{file.stem}/" for file in files]
        found = [
            (labels[n] + name, n, name, at, size) for n, file in enumerate(files) for name, at, size in _scan(file)
        ]
        found.sort(key=lambda image: in_order(image[0]))
        twice = next((image for image, other in pairwise(found) if image[0] == other[0]), None)
        if twice:
            raise UserError(f"{files[twice[1]]} holds {twice[2]} twice: make the tar file anew")
        super().__init__(root, files, labels, (image[1:] for image in found))
        loose = next((image for image in found if "/" not in image[0]), None)
        if loose:
            raise UserError(f"{loose[2]} in {root} lies in no class folder: make the tar file anew without it")
        self.classes, self.targets = numbered(_class_folders(found, alone=root.is_file()))
        refuse_parts(root, self.classes, "give each a tar file of its own, train.tar and val.tar (or test.tar)")
        refuse_masks(root, images_and_masks(self.classes))


class ShardSource(ArchiveSource):
    """Images in webdataset shards, in the shards' order.

    The files of a sample share their path up to the first dot of the file's name. Its class is what the ``.cls`` file
    holds, or ``label`` or ``cls`` in the ``.json`` file: a number or a name. ``classes.txt`` in the shards' folder
    (or ``classes``) names the numbers, one per line; without it the values are the names.

    Args:
        root: The shards' folder.
        shards: The shards in order; None for all tar files of the folder.

    Raises:
        UserError: No shards, or one that is damaged, holds no images, or images without a class.
    """

    def __init__(self, root: Path, shards: Sequence[Path] | None = None) -> None:
        shards = tar_files(root) if shards is None else shards
        if not shards:
            raise UserError(f"no webdataset shards (*.tar) in {root}: name their folder with --data")
        values: list[int | str] = []
        super().__init__(root, shards, [f"{shard.name}/" for shard in shards], self._samples(shards, values))
        known = _class_names(root)
        names = sorted({str(value) for value in values}, key=in_order)
        self.classes = names if known is None else known
        numbers: dict[int | str, int] = {name: number for number, name in enumerate(self.classes)}
        if known is None:
            numbers |= {value: numbers[str(value)] for value in set(values)}
        else:
            numbers |= {number: number for number in range(len(known))}
        unknown = next((value for value in values if value not in numbers), None)
        if unknown is not None:
            raise UserError(f"class {unknown!r} of a shard in {root} is none of the {len(known or [])} in classes.txt")
        self.targets = [numbers[value] for value in values]

    @staticmethod
    def _samples(shards: Sequence[Path], values: list[int | str]) -> Iterator[Piece]:
        """The images of all shards; their classes are appended to ``values`` on the way."""
        for number, shard in enumerate(shards):
            for name, offset, size, value in _samples(shard):
                values.append(value)
                yield number, name, offset, size


def _class_folders(found: Sequence[tuple[str, int, str, int, int]], *, alone: bool) -> list[str]:
    """The class of each image (label and name, file, name in it, ...): the first folder in its tar file, or the file.

    A tar file whose images do not all lie in folders names their class itself. A folder around all class folders
    (``train/``, or any in a single tar file) is none.
    """
    paths = [_parts(name) for _, _, name, _, _ in found]
    loose = {image[1] for image, parts in zip(found, paths, strict=True) if len(parts) < 2}
    around = {parts[0] for parts in paths}
    packed = len(around) == 1 and min(map(len, paths)) > 2 and (alone or find_splits(around))
    names = []
    for image, parts in zip(found, paths, strict=True):
        label = _parts(image[0])[0] if image[1] in loose else parts[int(bool(packed))]
        names.append(label)
    return names


def tar_files(folder: Path) -> list[Path]:
    """The tar files directly in a folder, in natural order.

    Raises:
        UserError: The folder cannot be read.
    """
    with attempt(f"read the folder {folder}"):
        names = [name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith(".")]
    return [folder / name for name in sorted(names, key=in_order)]


def is_shard(path: Path) -> bool:
    """Whether a tar file holds webdataset samples, by its first few members."""
    try:
        return any(Path(member.name).suffix in (".cls", ".json") for member in islice(_members(path), 8))
    except UserError:
        return False


def _members(path: Path, start: int = 0) -> Iterator[tarfile.TarInfo]:
    """A tar file's members from an offset on.

    Raises:
        UserError: It cannot be read, or does not end as a tar file does; Python's own reader takes damage for the end.
    """
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    yield member
                    tar.members.clear()  # type: ignore[attr-defined]  # it would hold every member until the end
                file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise _damaged(path, error) from None
    if not whole:
        raise UserError(f"{path} is damaged or cut short: its end mark is missing, fetch or make it again")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return UserError(f"cannot read {path} ({reason}): it must be a whole, uncompressed tar file")


def _parts(name: str) -> list[str]:
    """The folders and the file of a member's path, which may begin with './'."""
    return [part for part in name.split("/") if part not in ("", ".")]


def _hidden(parts: Sequence[str]) -> bool:
    return any(map(is_junk, parts))


def _scan(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every image in a tar file, by timm's reader; its pickled cache is left out of it."""
    try:
        samples = extract_tarinfos(str(path), cache_tarinfo=False, extensions=set(IMAGE_EXTENSIONS), sort=False)[0]
    except (tarfile.TarError, OSError, OverflowError, EOFError) as error:
        raise _damaged(path, error) from None
    except ValueError:  # timm's for no images at all
        samples = []
    end, found = 0, 0
    for member, _, inner in samples:
        offset, size = member.offset_data, member.size
        parts = _parts(member.name)
        if inner is not None:  # a tar file within, whose members count from its beginning
            offset += inner.offset_data
            parts = [*_parts(os.path.splitext(inner.name)[0]), *parts]
        end = max(end, -(-(offset + size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if not _hidden(parts):
            found += 1
            yield "/".join(parts), offset, size
    for _ in _members(path, end):  # timm ends at damage, too
        pass
    if not found:
        raise UserError(f"no images in {path}: it must hold files ending in {' '.join(IMAGE_EXTENSIONS)}")


def _samples(shard: Path) -> Iterator[tuple[str, int, int, int | str]]:
    """Name, offset, size and class of every image in a shard."""
    groups: dict[str, dict[str, tuple[str, int, int]]] = {}
    for member in _members(shard):
        parts = _parts(member.name)
        extension = PurePosixPath(member.name).suffix.lower()
        if member.isdir() or _hidden(parts) or extension not in (*IMAGE_EXTENSIONS, ".cls", ".json"):
            continue
        if not member.isfile():
            raise UserError(f"{member.name} in {shard} is a link: make the shard anew with the file itself")
        key = "/".join([*parts[:-1], parts[-1].partition(".")[0]])
        role = ".image" if extension in IMAGE_EXTENSIONS else extension
        group = groups.setdefault(key, {})
        if role in group:
            raise UserError(
                f"sample {key!r} in {shard} has two {role[1:]} files ({group[role][0]} and {'/'.join(parts)}): a "
                "sample's name ends at the first dot, rename one of them"
            )
        group[role] = "/".join(parts), member.offset_data, member.size
    images = 0
    try:
        with open(shard, "rb") as file:
            for key, group in groups.items():
                image = group.get(".image")
                if image is None and ".cls" in group:
                    raise UserError(f"sample {key!r} in {shard} has a class and no image: make the shard anew")
                if image is not None:
                    images += 1
                    yield *image, _class_value(file, group, f"image {image[0]} in {shard}")
    except OSError as error:
        raise _damaged(shard, error) from None
    if not images:
        raise UserError(f"no images in {shard}: an empty shard, or one without files in {' '.join(IMAGE_EXTENSIONS)}")


def _class_value(file: Any, group: dict[str, tuple[str, int, int]], what: str) -> int | str:
    role = ".cls" if ".cls" in group else ".json"
    if role not in group:
        raise UserError(f"{what} has no class: a .cls file, or label or cls in a .json file, must lie beside it")
    _, offset, size = group[role]
    file.seek(offset)
    try:
        if size > MOST_BYTES:
            raise ValueError
        value: Any = file.read(size).decode("utf-8").strip()
        if role == ".json":
            value = parse_json(value, finite=False)
            value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
        if isinstance(value, str) and len(value) <= MOST_DIGITS and value.removeprefix("-").isdecimal():
            value = int(value)
    except ValueError:
        value = None
    valid = 0 < len(value) <= MOST_OF_A_NAME if isinstance(value, str) else type(value) is int and value >= 0
    if not valid:
        raise UserError(f"{what} has no class: its {role} file gives no number from 0 on and no name")
    return value


def _class_names(folder: Path) -> list[str] | None:
    """The names in ``classes.txt`` or ``classes``, if there is one."""
    path = next((folder / name for name in ("classes.txt", "classes") if (folder / name).is_file()), None)
    if path is None:
        return None
    names = plain_names(class_lines(path), path)
    if not names:
        raise UserError(f"{path} is empty: give one name per line")
    twice = next((name for name, other in pairwise(sorted(names)) if name == other), None)
    if twice:
        raise UserError(f"{path} names {twice!r} twice: the names must differ")
    return names
