"""The commands `inspect` and `generate`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay_attention.runtime.artifact import Artifact

Subparsers = Any  # argparse names its type only privately


def add_commands(subparsers: Subparsers) -> None:
    """Adds this room's commands; nothing heavy is imported before one of them runs."""
    inspect = subparsers.add_parser(
        "inspect", help="print what an artifact holds", description=_inspect.__doc__
    )
    inspect.add_argument("artifact", metavar="OUT", help="artifact folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--check", action="store_true", help="read every file and compare its sha256")
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    """Print what an artifact holds: model, prefix, cache sizes, files."""
    from relay_attention.runtime.artifact import Artifact

    artifact = Artifact.open(arguments.artifact)
    if arguments.check:
        _check(artifact)
    if arguments.json:
        described = artifact.manifest.to_json() | {"path": str(artifact.path), "checked": arguments.check}
        print(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        print(_describe(artifact, arguments.check))
    return 0


def _check(artifact: Artifact) -> None:
    from tqdm import tqdm

    total = sum(entry.bytes for entry in artifact.manifest.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", leave=False, disable=None) as bar:
        artifact.check_hashes(bar.update)


def _describe(artifact: Artifact, checked: bool) -> str:
    manifest = artifact.manifest
    geometry, prefix, batch = manifest.geometry, manifest.prefix, 32
    shared = prefix.length * manifest.kv_bytes_per_token
    context = manifest.max_context * manifest.kv_bytes_per_token
    windows = sorted({size for size in geometry.local_window_size if size >= 0})
    rows = [
        ("artifact", f"{artifact.path} (format 1, op 1, {manifest.producer})"),
        ("model", f"{manifest.source.get('architecture', '?')} from {manifest.source.get('kind', '?')}"),
        ("model id", manifest.model_id[:16]),
        (
            "geometry",
            f"{geometry.num_layers} layers, heads {_each(geometry.num_heads)}, kv heads "
            f"{_each(geometry.kv_num_heads)}, head_dim {_each(geometry.head_dim)}, "
            f"vocabulary {geometry.vocab_size}, {geometry.max_positions} positions"
            + (f", local windows {windows}" if windows else ""),
        ),
        ("precision", manifest.dtype),
        ("prefix", f"{prefix.length} tokens, {prefix.mode}, {prefix.template} text, {_size(shared)} of KV"),
        ("context", f"{manifest.max_context} tokens a request, {_size(context)} of KV"),
        (
            f"KV of {batch} requests",
            f"{_size(shared + batch * context)} with the prefix once, {_size(batch * (shared + context))} without",
        ),
        ("logits", manifest.logits),
        ("end tokens", ", ".join(map(str, manifest.tokens.eos)) or "none"),
    ]
    rows += [(name, _size(entry.bytes)) for name, entry in manifest.files.items()]
    rows += [("sha256", "every file is as exported")] if checked else []
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _each(values: tuple[int, ...]) -> str:
    """One number where all layers agree, the range otherwise."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}" if values else "0"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
