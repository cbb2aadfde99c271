"""The artifact: a folder that holds one model with one system prompt, and opens without the tools that made
it.

The exporter writes through the same classes that the runtime reads through. Whatever is wrong with a folder
is an `ArtifactError` that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relay_attention.errors import ArtifactError
from relay_attention.runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MODEL_NAME,
    OP_VERSION,
    PREFIX_NAME,
    SYSTEM_PROMPT_NAME,
    WEIGHTS_NAME,
    FileEntry,
    Geometry,
    IoNames,
    Manifest,
    PrefixInfo,
    TokenIds,
    file_sha256,
    token_sha256,
)
from relay_attention.runtime.prefix_file import PREFIX_ALIGNMENT, Layer, PrefixFile, PrefixHeader

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "MODEL_NAME",
    "OP_VERSION",
    "PREFIX_ALIGNMENT",
    "PREFIX_NAME",
    "SYSTEM_PROMPT_NAME",
    "WEIGHTS_NAME",
    "Artifact",
    "FileEntry",
    "Geometry",
    "IoNames",
    "Layer",
    "Manifest",
    "PrefixFile",
    "PrefixHeader",
    "PrefixInfo",
    "TokenIds",
    "file_sha256",
    "token_sha256",
]


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
