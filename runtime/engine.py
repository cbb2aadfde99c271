"""TensorRT plans in an artifact's folder engine/: which there are, and whether one fits this box.

A plan is two files: KEY.plan and KEY.json beside it, written by `relay-attention build`. The JSON says for
which TensorRT, GPU and model the plan was built, so that a plan that does not fit is refused with the reason,
before TensorRT reads it. Needs no TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relay_attention.errors import BackendError
from relay_attention.runtime.artifact import (
    MODEL_NAME,
    WEIGHTS_NAME,
    Artifact,
    FileEntry,
    Manifest,
    file_sha256,
)

FOLDER = "engine"
FORMAT = "relay-attention-engine"
FORMAT_VERSION = 1
ADDRESS_ALIGNMENT = 256  # bytes; IExecutionContext::setTensorAddress asks for it
Range = tuple[int, int, int]  # minimum, optimum, maximum


@dataclass(frozen=True)
class Box:
    """What a plan depends on beside the model: TensorRT's version and the GPU."""

    tensorrt: str
    gpu: str
    compute_capability: str  # "9.0"


@dataclass(frozen=True)
class Profile:
    """Sizes that an optimization profile of the engine serves, as (minimum, optimum, maximum)."""

    batch: Range
    sequence: Range


@dataclass(frozen=True)
class EngineInfo:
    """The JSON beside a plan.

    prefill: equal to decode where the plan has no other profile; prompts then go token by token. model:
    `model_hash` of the artifact. prefix_length: tokens of the prefix that the plan was built for, the largest
    with an input prefix. prefix_tokens: token hash of the prefix inside the plan, "" with an input prefix.
    refit: whether the prefix inside can be replaced by one of the same length. max_context: largest cache of
    a request. plugin: file name of the plugin's library.
    """

    box: Box
    model: str
    dtype: str
    decode: Profile
    prefill: Profile
    max_context: int
    prefix_mode: str
    prefix_length: int
    prefix_tokens: str
    refit: bool
    plugin: str
    plan: FileEntry

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The plan's optimization profiles, in its order: decode, and prefill if it is another."""
        return (self.decode,) if self.prefill == self.decode else (self.decode, self.prefill)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> EngineInfo:
        """Reads a plan's JSON. Raises: BackendError if it is damaged or of another format."""
        try:
            data = json.loads(path.read_text("utf-8"))
            if (data["format"], data["format_version"]) != (FORMAT, FORMAT_VERSION):
                raise BackendError(
                    f"{path}: format {data['format']} {data['format_version']}, not {FORMAT} "
                    f"{FORMAT_VERSION}: "
                    "build the engine again"
                )
            return cls(
                box=Box(**data["box"]),
                decode=_profile(data["decode"]),
                prefill=_profile(data["prefill"]),
                plan=FileEntry(int(data["plan"]["bytes"]), str(data["plan"]["sha256"])),
                **{name: kind(data[name]) for name, kind in _PLAIN_FIELDS.items()},
            )
        except OSError as error:
            raise BackendError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(f"{path}: damaged ({error!r}): build the engine again") from error


_PLAIN_FIELDS: dict[str, type] = {
    "model": str,
    "dtype": str,
    "max_context": int,
    "prefix_mode": str,
    "prefix_length": int,
    "prefix_tokens": str,
    "refit": bool,
    "plugin": str,
}


def _profile(data: dict[str, Any]) -> Profile:
    batch, sequence = (tuple(int(size) for size in data[name]) for name in ("batch", "sequence"))
    if len(batch) != 3 or len(sequence) != 3:
        raise ValueError(f"profile {data}")
    return Profile((batch[0], batch[1], batch[2]), (sequence[0], sequence[1], sequence[2]))


def model_hash(manifest: Manifest) -> str:
    """Identity of graph and weights, the prefix's content excluded: a plan outlives a refitted prefix."""
    digest = hashlib.sha256()
    for name in (MODEL_NAME, WEIGHTS_NAME):
        if name in manifest.files:
            digest.update(manifest.files[name].sha256.encode())
    return digest.hexdigest()


def cache_capacity(manifest: Manifest, max_context: int) -> int:
    """max_context rounded up so that every slot of every cache begins where TensorRT takes a tensor's
    address."""
    granularity = 1
    for heads, dim in manifest.geometry.layers:
        token_bytes = heads * dim * manifest.storage_dtype.itemsize
        granularity = math.lcm(granularity, ADDRESS_ALIGNMENT // math.gcd(ADDRESS_ALIGNMENT, token_bytes))
    return -(-max_context // granularity) * granularity


def plan_path(artifact: Artifact, box: Box) -> Path:
    """Where the plan of this artifact for that box lies, built or not."""
    gpu = re.sub(r"[^a-z0-9]+", "-", box.gpu.lower()).strip("-")
    capability = box.compute_capability.replace(".", "")
    key = f"trt{box.tensorrt}-{gpu}-sm{capability}-{model_hash(artifact.manifest)[:12]}"
    return artifact.path / FOLDER / f"{key}.plan"


def find_engine(artifact: Artifact, box: Box) -> tuple[Path, EngineInfo]:
    """The plan for this box and its description; its size and content are checked.

    Raises: BackendError saying why no plan in the folder fits: none was built, or for each that was, another
        TensorRT, GPU or model, a prefix of another length, or a file that is truncated or damaged.
    """
    path = plan_path(artifact, box)
    if not path.with_suffix(".json").is_file():
        others = sorted((artifact.path / FOLDER).glob("*.json"))
        reasons = [f"{other.name}: {_misfit(artifact, box, other)}" for other in others]
        found = "; ".join(reasons) if reasons else "there is none at all"
        raise BackendError(
            f"{artifact.path / FOLDER}: no TensorRT plan fits TensorRT {box.tensorrt} on {box.gpu} "
            f"(compute capability {box.compute_capability}): {found}. Run `relay-attention build "
            f"{artifact.path}` "
            "on this box or one like it"
        )
    info = EngineInfo.read(path.with_suffix(".json"))
    if reason := _contradiction(artifact, box, info):
        raise BackendError(f"{path}: does not fit: {reason}; build the engine again")
    _check_file(path, info)
    return path, info


def write_engine(path: Path, plan: bytes | memoryview, info: EngineInfo) -> None:
    """Writes plan and description beside and renames them, the description last."""
    path.parent.mkdir(exist_ok=True)
    described = path.with_suffix(".json")
    described.unlink(missing_ok=True)  # a description never stands beside the plan of another
    _replace(path, plan)
    _replace(described, (json.dumps(info.to_json(), indent=2) + "\n").encode())


def _replace(path: Path, content: bytes | memoryview) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def _misfit(artifact: Artifact, box: Box, described: Path) -> str:
    try:
        info = EngineInfo.read(described)
    except BackendError as error:
        return str(error)
    return _contradiction(artifact, box, info) or "it was renamed or copied under another name"


def _contradiction(artifact: Artifact, box: Box, info: EngineInfo) -> str:
    """Why a plan does not fit; empty if it does."""
    prefix = artifact.manifest.prefix
    if info.box.tensorrt != box.tensorrt:
        return f"built by TensorRT {info.box.tensorrt}, this is {box.tensorrt}"
    if (info.box.gpu, info.box.compute_capability) != (box.gpu, box.compute_capability):
        return (
            f"built on {info.box.gpu} (compute capability {info.box.compute_capability}), this is {box.gpu} "
            f"({box.compute_capability})"
        )
    if info.prefix_mode != prefix.mode:
        return f"built for a prefix that is {info.prefix_mode}, the artifact's is {prefix.mode}"
    if prefix.mode == "static" and info.prefix_length != prefix.length:
        return f"built for a prefix of {info.prefix_length} tokens, the artifact's has {prefix.length}"
    if prefix.length > info.prefix_length:
        return (
            f"built for a prefix of at most {info.prefix_length} tokens, the artifact's has {prefix.length}"
        )
    if info.model != model_hash(artifact.manifest):
        return "built from another model, or another export of it"
    if prefix.mode == "static" and info.prefix_tokens != prefix.token_sha256 and not info.refit:
        return "built with another system prompt, and without --refit"
    return ""


def _check_file(path: Path, info: EngineInfo) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise BackendError(
            f"{path}: missing, though {path.with_suffix('.json').name} is there: build it again"
        )
    if size != info.plan.bytes:
        what = "truncated" if size < info.plan.bytes else "changed"
        raise BackendError(
            f"{path}: {what}: {size} bytes, {info.plan.bytes} were built; copy or build it again"
        )
    if file_sha256(path) != info.plan.sha256:
        raise BackendError(f"{path}: content is damaged (sha256 differs): copy or build it again")
