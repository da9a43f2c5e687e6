"""Reads a .pt2 archive without trusting it, and writes it anew from the checked parts alone.

torch unpickles, without restriction, tensors and constants that a table in the archive marks so,
custom objects, and the whole of some older layouts; it loads compiled libraries too. What is in an
archive is therefore listed here, and anything else is refused. torch never sees the file itself:
two readers of one zip file may see two different contents.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from torch.export.pt2_archive import PT2ArchiveWriter

from raycompress.artifacts.program import UnsafeProgram, checked_program
from raycompress.errors import ArtifactError

__all__ = ["METADATA", "clean_archive"]

METADATA = "extra/raycompress.json"
_PROGRAM = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_TABLES = {
    "data/weights/model_weights_config.json": "weight",
    "data/constants/model_constants_config.json": "tensor",
}
_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_IGNORED = re.compile(r"\.data/(version|serialization_id)|extra/[^/]+")
_PICKLED = re.compile(r"data/(weights|constants)/.*")
# All that `torch.save` of tensors in tuples, lists and dicts refers to.
_TENSOR_PICKLE = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|torch\._tensor _rebuild_from_type_v2|"
    r"collections OrderedDict|torch (\w*Storage|Tensor)|torch\.storage UntypedStorage"
)
_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def clean_archive(
    source: Path | io.BytesIO, shown: Path, namespaces: Collection[str], metadata: str | None = None
) -> tuple[io.BytesIO, dict[str, Any]]:
    """A checked archive without pickles: the program, its tensors and the metadata.

    Args:
        source: where the archive is.
        shown: the path that errors name.
        namespaces: of operators that may be called, beside those of `program.NAMESPACES`.
        metadata: JSON to store in place of what the archive holds.

    Returns:
        The new archive, and its metadata.

    Raises:
        ArtifactError: naming the file and the part of it that is damaged or could run code.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            parts = _parts(archive, shown)
            program = _json(archive, parts, _PROGRAM, shown)
            tables = {name: _json(archive, parts, name, shown) for name in _TABLES}
            for name, content in ((_PROGRAM, program), *tables.items()):
                try:
                    # Each is written again as it was understood here.
                    content = checked_program(content, namespaces)
                except (UnsafeProgram, RecursionError) as error:
                    _refuse(shown, name, f"could run code: {error}")
                if name == _PROGRAM:
                    program = content
                else:
                    tables[name] = content
            used = [p for name in _TABLES for p in _tensors(tables[name], name, parts, shown)]
            if _SAMPLES in parts:
                _check_samples(archive.read(parts[_SAMPLES]), shown)
            for name, value in _FIXED.items():
                if name in parts and archive.read(parts[name]).strip() != value:
                    _refuse(shown, name, f"isn't {value.decode()!r}")
            if metadata is None:
                kept = _json(archive, parts, METADATA, shown) if METADATA in parts else {}
                metadata = json.dumps(kept)
            return _write(archive, parts, program, tables, used, metadata), json.loads(metadata)
    except FileNotFoundError:
        raise ArtifactError(f"{shown}: there is no such file") from None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise ArtifactError(f"{shown} is no .pt2 archive, or damaged: {error}") from error


def _refuse(shown: Path, member: str, reason: str) -> NoReturn:
    raise ArtifactError(f"{shown}: {member} {reason}; nothing was loaded")


def _parts(archive: zipfile.ZipFile, shown: Path) -> dict[str, zipfile.ZipInfo]:
    """Members by their name below the root folder, each of a known kind."""
    parts: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    assert archive.fp is not None
    size = archive.fp.seek(0, io.SEEK_END)
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        roots.add(root)
        if not name:
            # As in the archives of torch 2.7 and older, which are unpickled.
            _refuse(shown, repr(info.filename), "isn't in the archive's folder")
        if len(roots) > 1 or not re.fullmatch(r"[\w\-]+", root) or ".." in name.split("/"):
            _refuse(shown, repr(info.filename), "leaves the archive's folder")
        if name in parts:
            _refuse(shown, name, "is there twice")
        if info.flag_bits & 1:
            _refuse(shown, name, "is encrypted")
        # torch stores without compression: no part is larger than the file is.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            _refuse(shown, name, f"is compressed, to be {info.file_size} bytes")
        known = name in (_PROGRAM, _SAMPLES, *_TABLES, *_FIXED)
        if not (known or _TENSOR.fullmatch(name) or _IGNORED.fullmatch(name)):
            torch_unpickles = _PICKLED.fullmatch(name) or name.endswith(".pt")
            _refuse(shown, name, "would be unpickled" if torch_unpickles else "is of unknown kind")
        parts[name] = info
    if sum(info.file_size for info in parts.values()) > size:
        _refuse(shown, "its list of parts", f"declares more than the file's {size} bytes")
    for name in (_PROGRAM, *_TABLES, "archive_format", "archive_version"):
        if name not in parts:
            raise ArtifactError(f"{shown}: {name} is missing; no .pt2 archive of torch 2.13")
    return parts


def _json(
    archive: zipfile.ZipFile, parts: dict[str, zipfile.ZipInfo], name: str, shown: Path
) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(parts[name]))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{shown}: {name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{shown}: {name} is no JSON object")
    return content


def _tensors(
    table: dict[str, Any], name: str, parts: dict[str, zipfile.ZipInfo], shown: Path
) -> list[str]:
    """Parts that a table reads as bare bytes; what it would unpickle is refused."""
    folder = name.rpartition("/")[0]
    used: dict[str, None] = {}  # in order, each once
    entries = table.get("config")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        _refuse(shown, name, "isn't a table of tensors")
    for key, entry in entries.items():
        part = f"{folder}/{entry.get('path_name')}"
        if entry.get("use_pickle") is not False or not _TENSOR.fullmatch(part):
            _refuse(shown, part, f"would be unpickled (for {key!r})")
        if part not in parts:
            _refuse(shown, part, f"is missing (for {key!r})")
        sizes = (entry.get("tensor_meta") or {}).get("sizes") or []
        # For an empty part torch makes zeros of the declared sizes, however large.
        if parts[part].file_size == 0 and {"as_int": 0} not in sizes:
            _refuse(shown, part, f"is empty (for {key!r})")
        used[part] = None
    return list(used)


def _check_samples(content: bytes, shown: Path) -> None:
    """Example inputs that torch.export.save pickled: tensors only. They are never read here."""
    if not content:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as saved:
            streams = [n for n in saved.namelist() if n.endswith(".pkl")]
            if len(streams) != 1:
                _refuse(shown, _SAMPLES, "isn't what torch.save writes")
            if saved.getinfo(streams[0]).file_size > len(content):
                _refuse(shown, _SAMPLES, "is compressed")
            for opcode, argument, _ in pickletools.genops(saved.read(streams[0])):
                if opcode.name in _CALLS:
                    _refuse(shown, _SAMPLES, "is a pickle of more than tensors")
                if opcode.name == "GLOBAL" and not _TENSOR_PICKLE.fullmatch(str(argument)):
                    _refuse(shown, _SAMPLES, f"is a pickle that calls {argument!r}")
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ArtifactError(f"{shown}: {_SAMPLES} isn't what torch.save writes: {error}") from error


def _write(
    archive: zipfile.ZipFile,
    parts: dict[str, zipfile.ZipInfo],
    program: dict[str, Any],
    tables: dict[str, dict[str, Any]],
    used: list[str],
    metadata: str,
) -> io.BytesIO:
    clean = io.BytesIO()
    with PT2ArchiveWriter(clean) as writer:
        writer.write_string(METADATA, metadata)
        writer.write_string(_PROGRAM, json.dumps(program))
        for name, table in tables.items():
            writer.write_string(name, json.dumps(table))
        for part in used:
            writer.write_bytes(part, archive.read(parts[part]))
        # torch wants the part, and reads an empty one as "no example inputs".
        writer.write_bytes(_SAMPLES, b"")
    clean.seek(0)
    return clean
