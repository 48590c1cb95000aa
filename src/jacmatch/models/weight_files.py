"""Read files of weights into named tensors, without running code and with bounded memory.

A file holds one or more *sets* of tensors, each under a key: "" for a bare state dict, `model`, `state_dict` or `ema`
for the entries of a training checkpoint. Which of them belongs to a module is decided by `weight_names`.
"""

import json
import re
import shlex
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, converted_errors, in_one_line, optional_package

Sets = dict[str, dict[str, Tensor]]

_DEPTH = 4  # levels of a checkpoint below which no state dict is looked for
_MODULES = 2**15  # most submodules of a module that was pickled whole
_INDEX_BYTES = 2**26
_IN_A_FOLDER = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")
"""The end of the name of one of several files."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before it wrote zip files
_OTHERS = {
    b"version https://git-lfs": ("a pointer of Git LFS", "Fetch the file itself: git lfs pull."),
    b"<": ("a text like a web page", "Download the file itself."),
    b"\x89HDF": ("an HDF5 file", "Export the weights from the library that wrote it, as safetensors."),
    b"GGUF": ("a GGUF file", "Export the weights from the library that wrote it, as safetensors."),
    b"\x1f\x8b": ("a file packed by gzip", "Unpack it first."),
    b"BZh": ("a file packed by bzip2", "Unpack it first."),
    b"\xfd7zXZ": ("a file packed by xz", "Unpack it first."),
}
_MODES = "safetensors (or its index .json), a folder of Hugging Face, .npz, or a checkpoint of torch (.pt, .pth, .bin)"


def read(source: Path, largest: int, *, allow_pickle: bool = False) -> Sets:
    """Return the sets of tensors in a file or folder."""
    size = _size(source)
    if source.is_dir():
        return read(_in_folder(source), largest, allow_pickle=allow_pickle)
    if source.name.endswith(".index.json"):
        return {"": _shards(source, largest, allow_pickle)}
    with source.open("rb") as file:
        head = file.read(512)
    kind = _kind(source, head, size)
    if kind != "torch":
        _check_size(source, size, largest)
        return {"": _safetensors(source) if kind == "safetensors" else _npz(source, size)}
    if not allow_pickle:
        rule = "`path` of `load_weights` must not be a pickle file (a torch checkpoint) unless `allow_pickle` is set."
        do = "Pass allow_pickle=True (tensors are read, no code is run), or convert it once: " + conversion(source)
        raise InputError(rule, got=f"`{source}`", do=do)
    _check_size(source, size, 4 * largest)
    return _checkpoint(source, head, size)


def conversion(source: Path) -> str:
    """Return the command line that converts a torch checkpoint to safetensors."""
    code = "import sys; from jacmatch.models import convert_weights; convert_weights(*sys.argv[1:])"
    return _command(code, source, ".safetensors")


def _command(code: str, source: Path, suffix: str) -> str:
    """A command line that runs this code; its arguments are the file to read and the file to write."""
    return f'python -c "{code}" {shlex.quote(str(source))} {shlex.quote(str(source.with_suffix(suffix)))}'


def _size(source: Path) -> int:
    """Bytes of the file; refuses what is neither a file nor a folder before anything is opened."""
    try:
        state = source.stat()
        if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
            raise InputError(f"`{source}` must be a file of weights.", got="a device or a pipe")
        if stat.S_ISREG(state.st_mode):
            source.open("rb").close()
    except OSError as error:
        raise InputError("Weights must be a readable file.", got=f"`{source}` ({error.strerror})") from error
    except ValueError as error:  # a name with a zero byte
        raise InputError("Weights must be a readable file.", got=f"`{source}` ({error})") from error
    return state.st_size


def _check_size(source: Path, size: int, largest: int) -> None:
    if size > largest:
        do = "Check that it belongs to this model."
        raise InputError(f"`{source}` must be a file of at most {largest:,} bytes.", got=f"{size:,} bytes", do=do)


def _kind(source: Path, head: bytes, size: int) -> str:
    """Return the format of the file by its first bytes, or safetensors by its name."""
    for start, (what, do) in _OTHERS.items():
        if head.startswith(start):
            raise InputError(f"`{source}` must be a file of weights: {_MODES}.", got=what, do=do)
    if source.suffix == ".safetensors":
        return "safetensors"
    if source.suffix == ".npz":
        return "npz"
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or head[257:262] == b"ustar":
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    got = "an empty file" if not head else "another kind of file"
    raise InputError(f"`{source}` must be a file of weights: {_MODES}.", got=got, do="Check the path.")


def _in_folder(folder: Path) -> Path:
    """The file of weights in a folder as Hugging Face writes them."""
    present = [folder / name for name in _IN_A_FOLDER if (folder / name).exists()]
    if not present:
        do = f"Name the file, or a folder with {' or '.join(_IN_A_FOLDER[:2])}."
        if (folder / ".metadata").exists():
            do = (
                "It is a distributed checkpoint of torch; convert it once: python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {folder.with_suffix('.pth')}"
            )
        raise InputError(f"`{folder}` must be a folder of weights.", got="one without any of the known names", do=do)
    _check_inside(present[0])
    return present[0]


def _check_inside(path: Path) -> None:
    """Refuse a link that leads out of the folder, except those of the Hugging Face cache to its blobs."""
    folder = path.parent.resolve()
    allowed = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if path.is_symlink() and not any(path.resolve().is_relative_to(each) for each in allowed):
        do = "Name the file itself, or copy it there."
        raise InputError(f"`{path}` must lie in its folder.", got="a link that leads out of it", do=do)


def _shards(index: Path, largest: int, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of several files, as the index distributes them."""
    parts = _weight_map(index)
    paths = {name: index.parent / name for name in dict.fromkeys(parts.values())}
    total = 0
    for name, path in paths.items():
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            rule = f"`{index}` must name files of its own folder."
            raise InputError(rule, got="a path", do="Load only an index that you trust, and correct its weight_map.")
        _check_inside(path)
        if path.is_dir() or name.endswith(".json"):
            raise InputError(f"`{index}` must name files of weights.", got=repr(name))
        total += _size(path)
    _check_size(index, total, largest)
    tensors: dict[str, Tensor] = {}
    for name, path in paths.items():
        (part,) = read(path, largest, allow_pickle=allow_pickle).values() or ({},)
        expected = {key for key, value in parts.items() if value == name}
        if part.keys() != expected:
            rule = f"`{path}` must contain the {len(expected)} tensors that {index.name} lists for it."
            got = f"{len(part)} tensors, {len(part.keys() & expected)} of them listed"
            raise InputError(rule, got=got, do="Copy it again.")
        tensors |= part
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    rule = f"`{index}` must be an index of weights, with a `weight_map` of names and files."
    _check_size(index, _size(index), _INDEX_BYTES)
    with converted_errors(rule, "Copy it again."):
        parts = json.loads(index.read_bytes())["weight_map"]
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise InputError(rule, got="another content", do="Copy it again.")
    return parts


def _safetensors(source: Path) -> dict[str, Tensor]:
    """A safetensors file; its header cannot claim more than the file has."""
    safetensors = optional_package("safetensors.torch", "`load_weights`", "pip install 'jacmatch[train]'")
    with converted_errors(f"`{source}` must be a complete safetensors file.", "Copy it again."):
        tensors: dict[str, Tensor] = safetensors.load(source.read_bytes())
    return tensors


def _npz(source: Path, size: int) -> dict[str, Tensor]:
    """The arrays of a numpy archive."""
    rule = f"`{source}` must be a complete numpy archive of plain arrays."
    with converted_errors(rule, "Write it with np.savez."):
        with zipfile.ZipFile(source) as parts:
            unpacked = sum(part.file_size for part in parts.infolist())
        if unpacked > 4 * size + 2**20:
            raise InputError(rule, got="parts far larger than the file", do="Write it with np.savez.")
        with np.load(source, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.require(arrays[name], requirements=("C", "W"))) for name in arrays.files}


class _Inert:
    """Inert substitute for an object whose class is not imported: it only stores the state in the file."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __new__(cls, *_: object) -> "_Inert":
        inert = super().__new__(cls)
        inert.state = None
        return inert

    def __setstate__(self, state: object) -> None:
        self.state = state


class _InertMapping:
    """Substitute for a subclass of `dict`: torch's unpickler fills only the mapping types that it knows."""

    def __new__(cls, *_: object) -> "OrderedDict[Any, Any]":  # type: ignore[misc]
        return OrderedDict()


def _checkpoint(source: Path, head: bytes, size: int) -> Sets:
    """The sets in a checkpoint of torch, read by its restricted unpickler.

    Objects of classes that the unpickler does not know (the settings of a script, numbers of NumPy, a whole module) are
    replaced by inert ones: no module is imported and none of their code is run.
    """
    unknown: list[str] = []
    if head.startswith(b"PK"):
        _check_archive(source, size)
        unknown = _unknown_classes(source)
    elif not head.startswith(_LEGACY):
        raise _needs_code(source, "an old tar archive" if head[257:262] == b"ustar" else "a pickle not by torch.save")
    try:
        try:
            return tensor_sets(_unpickled(source, dict.fromkeys(unknown, _Inert)))
        except Exception as error:
            if "Can only SETITEM" not in str(error):
                raise
            stands = {name: _Inert if name.startswith("numpy.") else _InertMapping for name in unknown}
            return tensor_sets(_unpickled(source, stands))
    except Exception as error:  # torch raises a different type for each way in which a file can be damaged
        if "Unsupported " in str(error) or "is blocked" in str(error):
            raise _needs_code(source, "one that needs classes outside torch") from error
        rule = f"`{source}` must be a complete torch checkpoint."
        raise InputError(rule, got=in_one_line(error), do="Copy it again.") from error


def _unpickled(source: Path, stands: Mapping[str, type]) -> object:
    """Return the content, with each named class replaced."""
    with torch.serialization.safe_globals([(stand, name) for name, stand in stands.items()]):
        return torch.load(source, map_location="cpu", weights_only=True)


def _check_archive(source: Path, size: int) -> None:
    """Refuse archives of code, parts larger than the file, and damage: torch itself compares no checksums."""
    rule = f"`{source}` must be a complete torch checkpoint."
    with converted_errors(rule, "Copy it again."), zipfile.ZipFile(source) as parts:
        names = parts.namelist()
        large = sum(part.file_size for part in parts.infolist()) > size
        damaged = None if large else parts.testzip()
    if damaged is not None:
        raise InputError(rule, got="a part whose checksum differs from the stored one", do="Copy it again.")
    programs = {
        "/constants.pkl": ("a TorchScript archive", "torch.jit.load(a, map_location='cpu').state_dict()"),
        "/archive_format": ("an exported program", "torch.export.load(a).state_dict"),
    }
    for part, (what, load) in programs.items():
        if any(name.endswith(part) for name in names):
            code = f"import sys, torch; a, b = sys.argv[1:]; torch.save(dict({load}), b)"
            do = f"If you trust it, extract its weights: {_command(code, source, '.state.pth')}"
            raise InputError(f"`{source}` must be weights, not a program.", got=what, do=do)
    if large:  # after the programs, whose text is compressed
        raise InputError(rule, got="parts that are larger than the file")


def _unknown_classes(source: Path) -> list[str]:
    """Names of the classes and functions that the restricted unpickler does not know."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:  # the reader gives a better message
        return []


def _needs_code(source: Path, what: str) -> InputError:
    load = "torch.load(a, map_location='cpu', weights_only=False)"
    if what.startswith("a pickle"):
        load = "__import__('pickle').load(open(a, 'rb'))"
    command = _command(f"import sys, torch; a, b = sys.argv[1:]; torch.save({load}, b)", source, ".state.pth")
    rule = f"`{source}` must be a checkpoint that can be read without running code."
    return InputError(rule, got=what, do=f"If you trust it, where its classes can be imported: {command}")


def tensor_sets(content: object) -> Sets:
    """Return the sets of named tensors in a checkpoint.

    Example:
        >>> sorted(tensor_sets({"epoch": 3, "model": {"weight": torch.ones(2)}, "ema": {"weight": torch.zeros(2)}}))
        ['ema', 'model']
    """
    sets: Sets = {}
    _collect(content, (), sets, set())
    return sets


def _collect(content: object, path: tuple[str, ...], sets: Sets, visited: set[int]) -> None:
    if id(content) in visited or len(path) > _DEPTH:
        return
    visited.add(id(content))
    attributes = _attributes(content)
    if isinstance(content, nn.Module):
        content = content.state_dict()
    elif "_parameters" in attributes:
        content = _state_of(attributes, [])
    elif isinstance(content, _Inert):
        content = attributes
    if not isinstance(content, Mapping):
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        sets[".".join(path)] = tensors
    for key, value in named.items():
        if not isinstance(value, Tensor):
            _collect(value, (*path, key), sets, visited)


def _attributes(value: object) -> Mapping[str, Any]:
    """Stored attributes of an object whose class was not imported."""
    if isinstance(value, _Inert):
        return value.state if isinstance(value.state, Mapping) else {}
    return vars(value) if isinstance(value, OrderedDict) else {}


def _state_of(attributes: Mapping[str, Any], visited: list[str], prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module that was pickled whole, read from what it stores."""
    visited.append(prefix)
    if len(visited) > _MODULES:
        raise ValueError(f"more than {_MODULES:,} modules")
    own = {}
    skipped = attributes.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for name, value in (attributes.get(part) or {}).items():
            if isinstance(value, Tensor) and name not in skipped:
                own[f"{prefix}{name}"] = value
    for name, child in (attributes.get("_modules") or {}).items():
        own |= _state_of(_attributes(child), visited, f"{prefix}{name}.")
    return own
