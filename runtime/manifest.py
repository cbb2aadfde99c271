"""relay.json: what an artifact holds and how to run it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from relay_attention import __version__
from relay_attention.errors import ArtifactError
from relay_attention.runtime import bfloat16

FORMAT = "relay-attention"
FORMAT_VERSION = 1
OP_VERSION = 1
MANIFEST_NAME = "relay.json"
MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "weights.bin"
PREFIX_NAME = "prefix.bin"
SYSTEM_PROMPT_NAME = "system_prompt.txt"
DTYPES = ("float32", "float16", bfloat16.NAME)

T = TypeVar("T")


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


class Section:
    """One JSON object of a file: a missing or mistyped field is an ArtifactError naming file and field."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: should be a JSON object, is {type(value).__name__}: damaged")
        self.value, self.where = value, where

    def get(self, key: str, kind: str = "str") -> Any:
        """The value of a field; `kind` is a key of _KINDS, written as in an annotation."""
        if key not in self.value and not kind.endswith("None"):
            raise ArtifactError(f"{self.where}: field {key!r} is missing: damaged")
        value: Any = self.value.get(key)
        words, check = _KINDS[kind]
        if not check(value):
            raise ArtifactError(f"{self.where}: field {key!r} should be {words}, is {value!r:.80}")
        if kind == "int" and value < 0:
            raise ArtifactError(f"{self.where}: field {key!r} is negative: {value}")
        return tuple(value) if kind.startswith("tuple") else value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """The value of a field that must be one of some words."""
        found: str = self.get(key)
        if found not in choices:
            raise ArtifactError(f"{self.where}: field {key!r} is {found!r}, not one of {', '.join(choices)}")
        return found

    def section(self, key: str) -> Section:
        """A JSON object in this one."""
        return Section(self.get(key, "dict"), f"{self.where}: {key}")

    def read(self, kind: type[T]) -> T:
        """A dataclass whose fields are this object's."""
        return kind(**{field.name: self.get(field.name, str(field.type)) for field in fields(kind)})  # type: ignore


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# kind, written as in an annotation: (in words, check)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("an integer", _is_int),
    "int | None": ("an integer or null", lambda value: value is None or _is_int(value)),
    "str": ("a string", lambda value: isinstance(value, str)),
    "str | None": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "dict": ("an object", lambda value: isinstance(value, dict)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "tuple[int, ...]": (
        "a list of integers",
        lambda value: isinstance(value, list) and all(map(_is_int, value)),
    ),
}


def check_versions(section: Section, file: Path | str) -> None:
    """Raises ArtifactError for a format that is newer, or an op version that is not this one's."""
    version = section.get("format_version", "int")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: made by a newer relay-attention "
            f"(format {version}, this one reads {FORMAT_VERSION}): upgrade"
        )
    if version < 1:
        raise ArtifactError(f"{file}: format_version {version} does not exist: damaged")
    op_version = section.get("op_version", "int")
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
    def from_json(cls, section: Section) -> Geometry:
        """Reads the "geometry" section of relay.json."""
        geometry = section.read(cls)
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
        """Hash of the token ids, as prefix.bin states it."""
        return token_sha256(self.token_ids)

    @classmethod
    def from_json(cls, section: Section) -> PrefixInfo:
        """Reads the "prefix" section of relay.json."""
        prefix = cls(
            mode=section.choice("mode", ("static", "input")),
            length=section.get("length", "int"),
            token_ids=section.get("token_ids", "tuple[int, ...]"),
            template=section.choice("template", ("chat", "plain")),
            file=section.get("file"),
            rendered_at=section.get("rendered_at", "str | None"),
        )
        if len(prefix.token_ids) != prefix.length:
            raise ArtifactError(
                f"{section.where}: length is {prefix.length}, {len(prefix.token_ids)} token_ids are listed"
            )
        if section.get("token_sha256") != prefix.token_sha256:
            raise ArtifactError(f"{section.where}: token_sha256 is not that of token_ids: damaged")
        return prefix

    def to_json(self) -> dict[str, Any]:
        """The "prefix" section of relay.json."""
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
        elements = sum(2 * heads * dim for heads, dim in self.geometry.layers)
        return elements * self.storage_dtype.itemsize

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """What NumPy holds keys and values in: uint16 for bfloat16, see `bfloat16`."""
        return bfloat16.storage(self.dtype)

    @classmethod
    def from_json(cls, data: Any, where: Path | str = MANIFEST_NAME) -> Manifest:
        """Reads the parsed JSON of a manifest; `where` is the file's name for messages.

        Raises: ArtifactError for a field that is missing, mistyped or contradicts another, or another
        version.
        """
        top = Section(data, str(where))
        if top.value.get("format") != FORMAT:
            raise ArtifactError(
                f'{where}: "format" is {top.value.get("format")!r}, not {FORMAT!r}: not an artifact'
            )
        check_versions(top, where)
        files, source = top.section("files"), top.section("source")
        manifest = cls(
            model_id=top.get("model_id"),
            dtype=top.choice("dtype", DTYPES),
            geometry=Geometry.from_json(top.section("geometry")),
            max_context=top.get("max_context", "int"),
            prefix=PrefixInfo.from_json(top.section("prefix")),
            tokens=top.section("tokens").read(TokenIds),
            logits=top.choice("logits", ("last", "all")),
            io=top.section("io").read(IoNames),
            source={key: source.get(key) for key in source.value},
            files={name: files.section(name).read(FileEntry) for name in files.value},
            producer=top.get("producer"),
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
        for name in self.files:
            if Path(name).name != name:
                raise ArtifactError(f"{where}: files: {name!r} is not a plain file name")
        for name in (MODEL_NAME, self.prefix.file):
            if name not in self.files:
                raise ArtifactError(f"{where}: files: {name} is not listed: damaged")

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
