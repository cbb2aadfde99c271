"""prefix.bin: the keys and values of a prefix, and a header that says of which model and which tokens."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_attention.errors import ArtifactError
from relay_attention.runtime import bfloat16
from relay_attention.runtime.manifest import (
    DTYPES,
    FORMAT_VERSION,
    OP_VERSION,
    Manifest,
    Section,
    check_versions,
)

PREFIX_MAGIC = b"RELAYPFX"
PREFIX_ALIGNMENT = 4096

Layer = tuple[npt.NDArray[Any], npt.NDArray[Any]]


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
        section = Section(data, f"{path}: header")
        check_versions(section, path)
        layers = section.get("layers", "list")
        if not all(
            isinstance(layer, list) and [type(item) for item in layer] == [int, int] for layer in layers
        ):
            raise ArtifactError(f"{path}: header: layers should be a list of [kv_num_heads, head_dim]")
        header = PrefixHeader(
            model_id=section.get("model_id"),
            dtype=section.choice("dtype", DTYPES),
            prefix_length=section.get("prefix_length", "int"),
            layers=tuple((heads, dim) for heads, dim in layers),
            token_sha256=section.get("token_sha256"),
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
            nbytes = heads * self.header.prefix_length * dim * bfloat16.storage(self.header.dtype).itemsize
            extents.append((offset, offset + _align(nbytes), nbytes))
            offset += 2 * _align(nbytes)
        return extents

    def read(self) -> list[Layer]:
        """(key, value) of every layer, each [kv_num_heads, prefix_length, head_dim], mapped from the file.

        bfloat16 is given as its bits, uint16.
        """
        dtype, length = bfloat16.storage(self.header.dtype), self.header.prefix_length
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
        dtype = bfloat16.storage(header.dtype)
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
