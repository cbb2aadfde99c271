"""The command `build`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_build_command(subparsers: Any) -> None:
    """Adds `build` to argparse's subparsers; what it needs is imported when it runs."""
    build = subparsers.add_parser(
        "build",
        help="build the TensorRT plan of an artifact, on the GPU it will run on",
        description=_build.__doc__,
    )
    build.add_argument("artifact", metavar="OUT", help="artifact folder, exported with --target tensorrt")
    sizes = (
        ("--max-batch", 64, "requests that decode together, at most"),
        (
            "--opt-batch",
            None,
            "requests to choose decode kernels for (--max-batch; a quarter if --chunk is not 1)",
        ),
        ("--prefill-batch", 8, "rows of one prefill call, if --chunk is not 1"),
        ("--chunk", 512, "tokens of one prefill call; 1: the plan decodes only, prompts go token by token"),
        ("--max-context", None, "tokens of one request beside the system prompt (the artifact's)"),
        ("--max-prefix", None, "tokens of a system prompt that is an input (the artifact's)"),
        ("--workspace", None, "MiB of scratch that TensorRT may use (its own choice)"),
        ("--optimization-level", None, "effort of TensorRT's builder, from 0, quick, to 5 (its own choice)"),
        ("--device", 0, "index of the GPU"),
    )
    for name, default, text in sizes:
        shown = text if default is None else f"{text} (%(default)s)"
        build.add_argument(name, type=int, default=default, metavar="N", help=shown)
    build.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="timings to reuse, of any model (OUT/engine/timing-*.cache)",
    )
    build.add_argument(
        "--no-refit",
        dest="refit",
        action="store_false",
        help="fix the system prompt; another one needs a new build",
    )
    build.add_argument(
        "--alias-cache", action="store_true", help="tell TensorRT 10.3+ that present_* is past_*"
    )
    build.add_argument("--force", action="store_true", help="build, even where a plan can be refitted")
    build.add_argument("--verbose", action="store_true", help="show TensorRT's log")
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    """Build the TensorRT plan of an artifact. Where one of the same model is there and only the system prompt
    is another, of the same length, it is refitted instead, in seconds."""
    from relay_attention.export.build import BuildOptions, build_engine

    options = BuildOptions(
        max_batch=arguments.max_batch,
        opt_batch=arguments.opt_batch,
        prefill_batch=arguments.prefill_batch,
        chunk=arguments.chunk,
        max_context=arguments.max_context,
        max_prefix=arguments.max_prefix,
        workspace=None if arguments.workspace is None else arguments.workspace << 20,
        optimization_level=arguments.optimization_level,
        timing_cache=arguments.timing_cache,
        refit=arguments.refit,
        alias_cache=arguments.alias_cache,
        verbose=arguments.verbose,
        device=arguments.device,
        force=arguments.force,
    )
    print(build_engine(arguments.artifact, options, progress=True))
    return 0
