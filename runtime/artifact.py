"""The artifact: a folder that holds one model with one system prompt, and opens without the tools that made
it.

`Manifest` is relay.json, `PrefixFile` is prefix.bin, `Artifact` is the folder. The exporter writes through
the same classes that the runtime reads through. Everything wrong with a folder is an `ArtifactError` that
names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention import __version__
from relay_attention.errors import ArtifactError

FORMAT = "relay-attention"
FORMAT_VERSION = 1
OP_VERSION = 1
MANIFEST_NAME = "relay.json"
MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "weights.bin"
PREFIX_NAME = "prefix.bin"
SYSTEM_PROMPT_NAME = "system_prompt.txt"
PREFIX_MAGIC = b"RELAYPFX"
PREFIX_ALIGNMENT = 4096
DTYPES = ("float32", "float16")

Layer = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def token_sha256(token_ids: Sequence[int]) -> str:
    """Hash of a token sequence: sha256 of the ids as little-endian int32."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hash of a file's content, read in pieces; `progress` is called with the bytes of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


class _Section:
    """One JSON object of a file: a missing or mistyped field is an ArtifactError naming file and field."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise ArtifactError(
                f"{where}: should be a JSON object, is {type(value).__name__}: the file is damaged"
            )
        self.value, self.where = value, where

    def get(self, key: str, kind: type, *, optional: bool = False) -> Any:
        found = self.value.get(key)
        if optional and found is None:
            return None
        if key not in self.value:
            raise ArtifactError(f"{self.where}: field {key!r} is missing: the file is damaged")
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ArtifactError(f"{self.where}: field {key!r} should be {kind.__name__}, is {found!r:.80}")
        if isinstance(found, int) and found < 0 and not optional:
            raise ArtifactError(f"{self.where}: field {key!r} is negative: {found}")
        return found

    def ints(self, key: str) -> tuple[int, ...]:
        found = self.get(key, list)
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
            raise ArtifactError(f"{self.where}: field {key!r} should be a list of integers")
        return tuple(found)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        found: str = self.get(key, str)
        if found not in choices:
            raise ArtifactError(f"{self.where}: field {key!r} is {found!r}, not one of {', '.join(choices)}")
        return found

    def section(self, key: str) -> _Section:
        return _Section(self.get(key, dict), f"{self.where}: {key}")


def _check_versions(section: _Section, file: Path | str) -> None:
    version = section.get("format_version", int)
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: made by a newer relay-attention "
            f"(format {version}, this one reads {FORMAT_VERSION}): upgrade"
        )
    if version < 1:
        raise ArtifactError(f"{file}: format_version {version} does not exist: the file is damaged")
    op_version = section.get("op_version", int)
    if op_version != OP_VERSION:
        raise ArtifactError(
            f"{file}: made for version {op_version} of the RelayAttention op, this one runs {OP_VERSION}: "
            f"{'upgrade relay-attention' if op_version > OP_VERSION else 'export the model again'}"
        )


@dataclass(frozen=True)
class Geometry:
    """Shape of the model; the tuples have one entry a layer."""

    num_layers: int
    num_heads: tuple[int, ...]
    kv_num_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    local_window_size: tuple[int, ...]  # -1: no window
    vocab_size: int
    max_positions: int

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(kv_num_heads, head_dim) of each layer, as prefix.bin states them."""
        return tuple(zip(self.kv_num_heads, self.head_dim, strict=True))

    @classmethod
    def from_json(cls, section: _Section) -> Geometry:
        geometry = cls(
            num_layers=section.get("num_layers", int),
            num_heads=section.ints("num_heads"),
            kv_num_heads=section.ints("kv_num_heads"),
            head_dim=section.ints("head_dim"),
            local_window_size=section.ints("local_window_size"),
            vocab_size=section.get("vocab_size", int),
            max_positions=section.get("max_positions", int),
        )
        for name in ("num_heads", "kv_num_heads", "head_dim", "local_window_size"):
            values = getattr(geometry, name)
            if len(values) != geometry.num_layers:
                raise ArtifactError(
                    f"{section.where}: {name} has {len(values)} entries for {geometry.num_layers} layers"
                )
            if name != "local_window_size" and any(value < 1 for value in values):
                raise ArtifactError(f"{section.where}: {name} has an entry below 1")
        return geometry


@dataclass(frozen=True)
class PrefixInfo:
    """The "prefix" section of relay.json.

    mode: "static" (initializers of the graph) or "input" (graph inputs, bound once, replaceable while
    running).
    template: "chat" (requests are rendered with the chat template) or "plain" (requests follow as they are).
    rendered_at: the time that a chat template's strftime_now saw (ISO 8601), or None.
    """

    mode: str
    length: int
    token_ids: tuple[int, ...]
    template: str
    file: str = PREFIX_NAME
    rendered_at: str | None = None

    @property
    def token_sha256(self) -> str:
        return token_sha256(self.token_ids)

    @classmethod
    def from_json(cls, section: _Section) -> PrefixInfo:
        prefix = cls(
            mode=section.choice("mode", ("static", "input")),
            length=section.get("length", int),
            token_ids=section.ints("token_ids"),
            template=section.choice("template", ("chat", "plain")),
            file=section.get("file", str),
            rendered_at=section.get("rendered_at", str, optional=True),
        )
        if len(prefix.token_ids) != prefix.length:
            raise ArtifactError(
                f"{section.where}: length is {prefix.length}, {len(prefix.token_ids)} token_ids are listed"
            )
        if section.get("token_sha256", str) != prefix.token_sha256:
            raise ArtifactError(
                f"{section.where}: token_sha256 is not that of token_ids: the file is damaged"
            )
        return prefix

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "length": self.length,
            "token_sha256": self.token_sha256,
            "file": self.file,
            "template": self.template,
            "rendered_at": self.rendered_at,
            "token_ids": list(self.token_ids),
        }


@dataclass(frozen=True)
class TokenIds:
    """Special tokens that decoding needs; `eos` may hold several, or none."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


@dataclass(frozen=True)
class IoNames:
    """Names of the graph's inputs and outputs; {layer} stands for the layer's number."""

    input_ids: str = "input_ids"
    context_lens: str = "context_lens"
    query_lens: str = "query_lens"
    logits: str = "logits"
    past_key: str = "past_key_values.{layer}.key"
    past_value: str = "past_key_values.{layer}.value"
    present_key: str = "present.{layer}.key"
    present_value: str = "present.{layer}.value"
    prefix_key: str = "prefix.{layer}.key"
    prefix_value: str = "prefix.{layer}.value"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file of the folder."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(path.stat().st_size, file_sha256(path))


@dataclass(frozen=True)
class Manifest:
    """relay.json: what the folder holds and how to run it.

    max_context: default capacity of one request's cache in tokens, prefix excluded.
    logits: "last" ([batch, vocab]) or "all" ([batch, sequence, vocab]).
    """

    model_id: str
    dtype: str
    geometry: Geometry
    max_context: int
    prefix: PrefixInfo
    tokens: TokenIds = field(default_factory=TokenIds)
    logits: str = "last"
    io: IoNames = field(default_factory=IoNames)
    source: dict[str, str] = field(default_factory=dict)  # kind, architecture
    files: dict[str, FileEntry] = field(default_factory=dict)
    producer: str = f"relay-attention {__version__}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in all layers together."""
        return sum(2 * heads * dim for heads, dim in self.geometry.layers) * np.dtype(self.dtype).itemsize

    @classmethod
    def from_json(cls, data: Any, where: Path | str = MANIFEST_NAME) -> Manifest:
        """Reads the parsed JSON of a manifest; `where` is the file's name for messages.

        Raises: ArtifactError for a field that is missing, mistyped or contradicts another, or another
        version.
        """
        top = _Section(data, str(where))
        if top.value.get("format") != FORMAT:
            raise ArtifactError(
                f'{where}: "format" is {top.value.get("format")!r}, not {FORMAT!r}: not an artifact'
            )
        _check_versions(top, where)
        tokens, io, files = top.section("tokens"), top.section("io"), top.section("files")
        for name in files.value:
            if Path(name).name != name:
                raise ArtifactError(f"{where}: files: {name!r} is not a plain file name")
        entries = {name: files.section(name) for name in files.value}
        source = top.section("source")
        manifest = cls(
            model_id=top.get("model_id", str),
            dtype=top.choice("dtype", DTYPES),
            geometry=Geometry.from_json(top.section("geometry")),
            max_context=top.get("max_context", int),
            prefix=PrefixInfo.from_json(top.section("prefix")),
            tokens=TokenIds(
                bos=tokens.get("bos", int, optional=True),
                eos=tokens.ints("eos"),
                pad=tokens.get("pad", int, optional=True),
            ),
            logits=top.choice("logits", ("last", "all")),
            io=IoNames(**{name: io.get(name, str) for name in IoNames.__dataclass_fields__}),
            source={key: source.get(key, str) for key in source.value},
            files={name: FileEntry(e.get("bytes", int), e.get("sha256", str)) for name, e in entries.items()},
            producer=top.get("producer", str),
        )
        manifest._check(where)
        return manifest

    def _check(self, where: Path | str) -> None:
        if self.max_context < 1:
            raise ArtifactError(f"{where}: max_context is {self.max_context}, at least 1 is needed")
        if self.prefix.length + self.max_context > self.geometry.max_positions:
            raise ArtifactError(
                f"{where}: prefix length {self.prefix.length} + max_context {self.max_context} exceed "
                f"the model's {self.geometry.max_positions} positions"
            )
        vocab_size = self.geometry.vocab_size
        ids = (*self.prefix.token_ids, *self.tokens.eos)
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            raise ArtifactError(
                f"{where}: a prefix or eos token id is outside the vocabulary of {vocab_size}"
            )
        for name in (MODEL_NAME, self.prefix.file):
            if name not in self.files:
                raise ArtifactError(f"{where}: files: {name} is not listed: the file is damaged")

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object, in the order of the format's description."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "op_version": OP_VERSION,
            "producer": self.producer,
            "source": self.source,
            "model_id": self.model_id,
            "dtype": self.dtype,
            "geometry": asdict(self.geometry),
            "max_context": self.max_context,
            "prefix": self.prefix.to_json(),
            "tokens": asdict(self.tokens),
            "logits": self.logits,
            "io": asdict(self.io),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads the file relay.json."""
        try:
            data = json.loads(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
            raise ArtifactError(f"{path}: not valid JSON: {error}") from error
        return cls.from_json(data, path)

    def write(self, path: Path) -> None:
        """Writes the file relay.json; the folder around it is what is replaced atomically."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        with path.open("wb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())


@dataclass(frozen=True)
class PrefixHeader:
    """JSON header of prefix.bin: says which model and which tokens the keys and values belong to."""

    model_id: str
    dtype: str
    prefix_length: int
    layers: tuple[tuple[int, int], ...]  # (kv_num_heads, head_dim)
    token_sha256: str

    @classmethod
    def of(cls, manifest: Manifest) -> PrefixHeader:
        """The header that the prefix.bin of a manifest must have."""
        return cls(
            model_id=manifest.model_id,
            dtype=manifest.dtype,
            prefix_length=manifest.prefix.length,
            layers=manifest.geometry.layers,
            token_sha256=manifest.prefix.token_sha256,
        )

    def pack(self) -> bytes:
        """Magic, length, JSON, and zeros up to where the first tensor starts."""
        fields = {"format_version": FORMAT_VERSION, "op_version": OP_VERSION, **asdict(self)}
        text = json.dumps(fields).encode("utf-8")
        packed = PREFIX_MAGIC + struct.pack("<I", len(text)) + text
        return packed.ljust(_align(len(packed)), b"\0")


def _align(offset: int) -> int:
    return -(-offset // PREFIX_ALIGNMENT) * PREFIX_ALIGNMENT


@dataclass(frozen=True)
class PrefixFile:
    """prefix.bin: key, value [kv_num_heads, prefix_length, head_dim] of every layer, 4096-aligned."""

    path: Path
    header: PrefixHeader
    data_offset: int

    @classmethod
    def open(cls, path: Path) -> PrefixFile:
        """Reads the header and checks the file's size against it; the tensors are not read."""
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                start = stream.read(len(PREFIX_MAGIC) + 4)
                if len(start) < len(PREFIX_MAGIC) + 4 or not start.startswith(PREFIX_MAGIC):
                    raise ArtifactError(
                        f"{path}: not a prefix file (it does not start with {PREFIX_MAGIC.decode()})"
                    )
                (length,) = struct.unpack("<I", start[len(PREFIX_MAGIC) :])
                if length > size:
                    raise ArtifactError(
                        f"{path}: header of {length} bytes in a file of {size}: truncated or damaged"
                    )
                data = json.loads(stream.read(length).decode("utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ArtifactError(f"{path}: header is not valid JSON: {error}") from error
        section = _Section(data, f"{path}: header")
        _check_versions(section, path)
        layers = section.get("layers", list)
        if not all(
            isinstance(layer, list) and [type(item) for item in layer] == [int, int] for layer in layers
        ):
            raise ArtifactError(f"{path}: header: layers should be a list of [kv_num_heads, head_dim]")
        header = PrefixHeader(
            model_id=section.get("model_id", str),
            dtype=section.choice("dtype", DTYPES),
            prefix_length=section.get("prefix_length", int),
            layers=tuple((heads, dim) for heads, dim in layers),
            token_sha256=section.get("token_sha256", str),
        )
        file = cls(path, header, _align(len(start) + length))
        extents = file.extents()
        needed = extents[-1][1] + extents[-1][2] if extents else file.data_offset
        if size < needed:
            raise ArtifactError(
                f"{path}: {size} bytes where its header asks for {needed}: truncated or damaged"
            )
        return file

    def extents(self) -> list[tuple[int, int, int]]:
        """(offset of the key, offset of the value, bytes of each) in the file, one entry a layer."""
        extents, offset = [], self.data_offset
        for heads, dim in self.header.layers:
            nbytes = heads * self.header.prefix_length * dim * np.dtype(self.header.dtype).itemsize
            extents.append((offset, offset + _align(nbytes), nbytes))
            offset += 2 * _align(nbytes)
        return extents

    def read(self) -> list[Layer]:
        """(key, value) of every layer, each [kv_num_heads, prefix_length, head_dim], mapped from the file."""
        dtype, length = np.dtype(self.header.dtype), self.header.prefix_length
        layers: list[Layer] = []
        for (heads, dim), (key_offset, value_offset, nbytes) in zip(
            self.header.layers, self.extents(), strict=True
        ):
            shape = (heads, length, dim)
            if not nbytes:  # an empty range cannot be mapped
                layers.append((np.zeros(shape, dtype), np.zeros(shape, dtype)))
                continue
            key, value = (
                np.memmap(self.path, dtype, "r", offset, shape) for offset in (key_offset, value_offset)
            )
            layers.append((key, value))
        return layers

    @classmethod
    def write(cls, path: Path, header: PrefixHeader, layers: Iterable[Layer]) -> PrefixFile:
        """Writes a prefix file, one layer in memory at a time, and flushes it to the disk."""
        dtype = np.dtype(header.dtype)
        with path.open("wb") as stream:
            stream.write(header.pack())
            for (heads, dim), pair in zip(header.layers, layers, strict=True):
                for tensor in pair:
                    if tensor.shape != (heads, header.prefix_length, dim) or tensor.dtype != dtype:
                        raise ValueError(f"prefix tensor {tensor.dtype} {tensor.shape} does not fit {header}")
                    stream.seek(_align(stream.tell()))
                    stream.write(np.ascontiguousarray(tensor).data)
            stream.flush()
            os.fsync(stream.fileno())
        return cls.open(path)

    def check_model(self, manifest: Manifest) -> None:
        """Raises ArtifactError unless this prefix, of whatever text, was computed by the manifest's model."""
        expected = PrefixHeader.of(manifest)
        if self.header.model_id != expected.model_id:
            raise ArtifactError(
                f"{self.path}: computed by another model (model_id {self.header.model_id[:12]}..., the "
                f"artifact's is {expected.model_id[:12]}...): compute it again with `relay-attention prefix`"
            )
        for name in ("dtype", "layers"):
            found, wanted = getattr(self.header, name), getattr(expected, name)
            if found != wanted:
                raise ArtifactError(f"{self.path}: {name} is {found}, the model's is {wanted}")


@dataclass(frozen=True)
class Artifact:
    """An opened folder: path, manifest, prefix file. Nothing large is read before it is asked for."""

    path: Path
    manifest: Manifest
    prefix: PrefixFile

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, prefix_only: bool = False) -> Artifact:
        """Opens a folder; checks the manifest, every file's presence and size, and the header of prefix.bin.

        prefix_only: of the files, only prefix.bin needs to be there.

        Raises: ArtifactError, naming the file and what to do. Contents are checked by `check_hashes` only.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file, an artifact is a folder" if folder.exists() else "no such folder"
            raise ArtifactError(f"{folder}: {what}")
        if not (folder / MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"{folder}: not a relay-attention artifact (it has no {MANIFEST_NAME}): "
                "make one with `relay-attention export`"
            )
        manifest = Manifest.read(folder / MANIFEST_NAME)
        for name, entry in manifest.files.items():
            if prefix_only and name != manifest.prefix.file:
                continue
            file = folder / name
            if not file.is_file():
                raise ArtifactError(
                    f"{file}: missing from the artifact: copy the folder again, or export again"
                )
            size = file.stat().st_size
            if size != entry.bytes:
                raise ArtifactError(
                    f"{file}: {size} bytes, {MANIFEST_NAME} says {entry.bytes}: "
                    f"{'truncated' if size < entry.bytes else 'changed'}; copy or export the folder again"
                )
        prefix = PrefixFile.open(folder / manifest.prefix.file)
        prefix.check_model(manifest)
        expected = PrefixHeader.of(manifest)
        if prefix.header != expected:
            raise ArtifactError(
                f"{prefix.path}: holds another prefix ({prefix.header.prefix_length} tokens, hash "
                f"{prefix.header.token_sha256[:12]}...) than {MANIFEST_NAME} says "
                f"({expected.prefix_length} tokens, hash {expected.token_sha256[:12]}...): "
                "compute it again with `relay-attention prefix`"
            )
        return cls(folder, manifest, prefix)

    def file(self, name: str) -> Path:
        """Path of one file of the folder, there or not."""
        return self.path / name

    def check_hashes(self, progress: Callable[[int], object] | None = None) -> None:
        """Reads every file and compares its sha256; `progress` is called with the bytes of each piece read.

        Raises: ArtifactError naming every file whose content is not what was exported.
        """
        damaged = [
            str(self.file(name))
            for name, entry in self.manifest.files.items()
            if file_sha256(self.file(name), progress) != entry.sha256
        ]
        if damaged:
            raise ArtifactError(
                f"{', '.join(damaged)}: content is damaged (sha256 differs): copy or export again"
            )
