"""The command `relay-attention`: every room adds its subcommands, which import what they need when run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from relay_attention import __version__
from relay_attention.errors import RelayError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The argument parser with the subcommands of every room."""
    from relay_attention.export import commands as export_commands
    from relay_attention.runtime import commands as runtime_commands

    parser = argparse.ArgumentParser(
        prog="relay-attention",
        description="Decode batches that share a long system prompt, read from memory once per batch.",
    )
    parser.add_argument("--version", action="version", version=f"relay-attention {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    export_commands.add_commands(subparsers)
    runtime_commands.add_commands(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns: 0 on success, 1 where the command found a mismatch, 2 for an error of the user's input or of the
        machine, 130 when interrupted.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except RelayError as error:
        print(f"relay-attention: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("relay-attention: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe (head, say) has enough
        sys.stderr.close()
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
