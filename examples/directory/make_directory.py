#!/usr/bin/env python3
"""Make a directory of names and extensions, requests that ask for one of them, and the expected answers.

The directory is the system prompt. A request's answer stands nowhere else, so a decoder that answers has read
the shared prefix. Standard library only; the same seed gives the same files.

    python make_directory.py --seed 7 --requests 32 -o OUT     # OUT/system_prompt.txt, OUT/requests.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

FIRST_NAMES = (  # noqa: SIM905 - a list of a hundred strings would be a hundred lines
    "Adam Agnes Alan Alice Amber Andrew Anna Arthur Barbara Ben Bianca Boris Carla Carlos Cecil Chloe "
    "Clara Colin Daisy Daniel David Diana Dora Edgar Edith Elena Elias Emma Eric Esther Eva Felix "
    "Fiona Flora Frank Gavin George Gina Gloria Grace Hannah Harold Hector Helen Henry Hugo Ida "
    "Ingrid Irene Ivan Jack Jane Jasper Joan Jonas Julia Karen Karl Kevin Laura Leo Lewis Lily Linda "
    "Louis Lucy Luna Marco Maria Martha Max Milo Mona Nadia Nancy Nina Noah Nora Olga Oliver Oscar "
    "Paula Peter Petra Ralph Rita Robert Rosa Samuel Sara Simon Sofia Stella Theo Thomas Vera Victor "
    "Walter Wendy Yara"
).split()
LAST_NAMES = (  # noqa: SIM905 - a list of a hundred strings would be a hundred lines
    "Abbott Archer Baker Banks Barnes Bishop Black Blake Bond Booth Bowen Brooks Brown Burns Carter "
    "Castle Chase Clark Cole Cook Cooper Cox Crane Cross Dale Davis Dean Drake Dunn Ellis Evans "
    "Farmer Field Fisher Fletcher Ford Foster Fox Frost Gardner Gibson Glover Grant Gray Green Hall "
    "Hardy Harper Hart Hayes Hill Holmes Hood Hunt Jones Keller King Knight Lake Lambert Lane Lloyd "
    "Long Marsh Mason Miller Moore Moss Nash Norton Owen Page Palmer Parker Pearson Perry Pike Poole "
    "Porter Potter Price Quinn Reed Rhodes Rivers Rose Sharp Shaw Smith Snow Stone Swift Turner Wade "
    "Walsh Ward Webb West Wolf Young"
).split()

HEADERS = (
    "You are the switchboard. Answer with the extension only.",
    "Company directory. Answer each question with the extension of the person, four digits.",
    "Names and extensions:",
)
QUESTIONS = (
    "What is the extension of {name}?",
    "{name}",
    "{name}?",
    "Extension of {name}, please.",
    "Which extension has {name}?",
    "Please connect me to {name}.",
    "How do I reach {name}?",
    "I am looking for {name}, what is the number?",
)


@dataclass(frozen=True)
class Entry:
    """One line of the directory: a full name, unique in its directory, and a four-digit extension."""

    first: str
    last: str
    extension: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


def is_held_out(first: int, last: int) -> bool:
    """Whether training never puts FIRST_NAMES[first] and LAST_NAMES[last] together (one pair in ten)."""
    return (3 * first + 7 * last) % 10 == 0


ALL_PAIRS = tuple((f, s) for f in range(len(FIRST_NAMES)) for s in range(len(LAST_NAMES)))
TRAINING_PAIRS = tuple(pair for pair in ALL_PAIRS if not is_held_out(*pair))
HELD_OUT_PAIRS = tuple(pair for pair in ALL_PAIRS if is_held_out(*pair))


def make_entries(
    rng: random.Random, count: int, pairs: tuple[tuple[int, int], ...] = ALL_PAIRS
) -> list[Entry]:
    """`count` entries in random order: name pairs drawn without, extensions with replacement."""
    if not 0 < count <= len(pairs):
        raise ValueError(f"a directory holds 1 to {len(pairs)} entries, not {count}")
    return [
        Entry(FIRST_NAMES[first], LAST_NAMES[last], f"{rng.randrange(10000):04d}")
        for first, last in rng.sample(pairs, count)
    ]


def format_system_prompt(entries: list[Entry], header: str = HEADERS[0]) -> str:
    """The header, then one line "Alice Stone 4821" an entry."""
    return "\n".join([header, *(f"{entry.name} {entry.extension}" for entry in entries)])


def make_request(rng: random.Random, entry: Entry) -> dict[str, str]:
    """A question for one entry, in one of several wordings: {"prompt": ..., "expected": ...}."""
    return {"prompt": rng.choice(QUESTIONS).format(name=entry.name), "expected": entry.extension}


def make_directory(
    seed: int, entries: int = 224, requests: int = 32, pairs: tuple[tuple[int, int], ...] = ALL_PAIRS
) -> tuple[str, list[dict[str, str]]]:
    """The system prompt (224 entries are about 1,580 tokens) and requests for names drawn from it."""
    rng = random.Random(f"directory {seed}")
    directory = make_entries(rng, entries, pairs)
    prompt = format_system_prompt(directory, rng.choice(HEADERS))
    asked = rng.sample(directory, min(requests, entries))
    asked += [rng.choice(directory) for _ in range(requests - len(asked))]
    return prompt, [make_request(rng, entry) for entry in asked]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", type=int, default=224, help="lines, 7 tokens each (default 224)")
    parser.add_argument("--requests", type=int, default=32, help="questions to make (default 32)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the two files")
    arguments = parser.parse_args()
    if not 0 < arguments.entries <= len(ALL_PAIRS):
        parser.error(f"--entries must be 1 to {len(ALL_PAIRS)}, not {arguments.entries}")
    if arguments.requests < 0:
        parser.error(f"--requests must not be negative, but is {arguments.requests}")
    prompt, requests = make_directory(arguments.seed, arguments.entries, arguments.requests)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "system_prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    (arguments.output / "requests.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
