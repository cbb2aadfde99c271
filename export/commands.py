"""The commands `export`, `prefix`, `verify` and (from build_command.py) `build`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXIT_MISMATCH = 1


def add_commands(subparsers: Any) -> None:
    """Adds this room's commands to argparse's subparsers; what they need is imported when they run."""
    from relay_attention.export.build_command import add_build_command

    export = subparsers.add_parser(
        "export", help="export a model with its system prompt", description=_export.__doc__
    )
    export.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a Hugging Face model, of onnxruntime-genai's model builder, or of an ONNX decoder "
        "(optimum, torch.onnx.export) with its config.json; or the .onnx file",
    )
    export.add_argument("--system-prompt", required=True, metavar="FILE", help="text file, UTF-8")
    export.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="artifact folder to write or replace"
    )
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="of weights and KV cache (fp32; what a genai folder or an ONNX decoder holds); bf16 runs on "
        "GPUs only",
    )
    export.add_argument(
        "--target",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="tensorrt keeps the graph to what TensorRT 8.6 takes; ONNX Runtime runs both (%(default)s)",
    )
    export.add_argument(
        "--prefix",
        choices=("static", "input"),
        default="static",
        help="prefix as initializers of the graph, or as inputs, replaceable while running (%(default)s)",
    )
    export.add_argument(
        "--all-logits", action="store_true", help="logits of every token, not of the last only"
    )
    _add_prompt_options(export)
    export.set_defaults(run=_export)

    prefix = subparsers.add_parser(
        "prefix", help="give an artifact a new system prompt", description=_prefix.__doc__
    )
    prefix.add_argument("artifact", metavar="OUT", help="artifact folder")
    prefix.add_argument("--system-prompt", required=True, metavar="FILE", help="text file, UTF-8")
    _add_prompt_options(prefix)
    prefix.set_defaults(run=_prefix)

    verify = subparsers.add_parser(
        "verify", help="compare an artifact with its model in transformers", description=_verify.__doc__
    )
    verify.add_argument("artifact", metavar="OUT", help="artifact folder")
    verify.add_argument(
        "--reference",
        metavar="MODEL",
        help="folder of the Hugging Face model; without it, --backend is compared with ONNX Runtime",
    )
    verify.add_argument("--requests", type=int, default=8, metavar="N", help="random prompts (%(default)s)")
    verify.add_argument("--new-tokens", type=int, default=16, metavar="N", help="of each (%(default)s)")
    verify.add_argument("--backend", default="onnxruntime", help="inference engine (%(default)s)")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (%(default)s)")
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of logits, relative to the largest (2e-4 for float32, 3e-2 for float16, 1e-1 for bfloat16)",
    )
    verify.add_argument("--threads", type=int, metavar="N", help="the engine's threads (its own choice)")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.set_defaults(run=_verify)
    add_build_command(subparsers)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of one request beside the system prompt (what the model's positions leave, up to 4096)",
    )
    parser.add_argument(
        "--template",
        choices=("chat", "plain"),
        help="use the tokenizer's chat template or not (if it has one)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="ONNX Runtime's threads (its own choice)")


def _export(arguments: argparse.Namespace) -> int:
    """Export a model with its system prompt: the prompt's keys and values are computed once and stored with
    the model."""
    from relay_attention.export.exporter import export_model
    from relay_attention.export.prefix import read_system_prompt

    output = export_model(
        arguments.model,
        read_system_prompt(Path(arguments.system_prompt)),
        arguments.output,
        precision=arguments.precision,
        target=arguments.target,
        max_context=arguments.max_context,
        prefix=arguments.prefix,
        all_logits=arguments.all_logits,
        template=arguments.template,
        threads=arguments.threads,
        progress=True,
    )
    _summarise(output)
    return 0


def _prefix(arguments: argparse.Namespace) -> int:
    """Give an artifact a new system prompt. The weights stay as they are; the folder is replaced as a
    whole."""
    from relay_attention.export.prefix import make_prefix, read_system_prompt

    output = make_prefix(
        arguments.artifact,
        read_system_prompt(Path(arguments.system_prompt)),
        max_context=arguments.max_context,
        template=arguments.template,
        threads=arguments.threads,
        progress=True,
    )
    _summarise(output)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    """Compare an artifact's greedy tokens and logits with transformers running the full prompts, or, without
    --reference, an engine with ONNX Runtime, layer by layer. Exit status 1 if they differ, or if weights hold
    NaN or Inf."""
    from relay_attention.export.verification import print_report, verify

    if arguments.reference is None:
        return _compare(arguments)
    report = verify(
        arguments.artifact,
        arguments.reference,
        requests=arguments.requests,
        new_tokens=arguments.new_tokens,
        backend=arguments.backend,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
        threads=arguments.threads,
        progress=True,
    )
    print_report(report, arguments.json)
    return 0 if report.ok else EXIT_MISMATCH


def _compare(arguments: argparse.Namespace) -> int:
    from relay_attention.errors import BackendError
    from relay_attention.export.compare import REFERENCE, compare
    from relay_attention.export.verification import print_report

    if arguments.backend == REFERENCE:
        raise BackendError("verify needs --reference MODEL to compare with, or another --backend")
    report = compare(
        arguments.artifact,
        arguments.backend,
        requests=arguments.requests,
        new_tokens=arguments.new_tokens,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
    )
    print_report(report, arguments.json)
    return 0 if report.ok else EXIT_MISMATCH


def _summarise(output: Path) -> None:
    from relay_attention.runtime.artifact import Artifact

    artifact = Artifact.open(output)
    manifest = artifact.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    print(
        f"{output}: {manifest.source.get('architecture', 'model')}, {manifest.dtype}, {size / 1e6:.1f} MB; "
        "prefix of "
        f"{manifest.prefix.length} tokens ({manifest.prefix.template}), max_context {manifest.max_context}",
        file=sys.stderr,
    )
