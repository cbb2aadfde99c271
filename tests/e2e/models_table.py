"""docs/models.md: family by source by backend, from what the tests of families found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs" / "models.md"
SOURCES = ("Hugging Face folder", "onnxruntime-genai folder")
COMMAND = "pytest tests/e2e --models-table --optimum-python PYTHON"
_HEAD = """# Models

Made by the tests themselves: `{command}` writes this file (PYTHON is one
with optimum-onnx), and the tests fail if it is not what they found. Every case is a tiny model with random
weights and a prefix of more than three windows.

- *right*: greedy tokens over a ragged batch are those of transformers running every request in full, and all
  logits are within the tolerance of `relay-attention verify` ([the rule](export.md#the-rule-of-verify)).
- CPU is ONNX Runtime on the CPU, which ran. ONNX Runtime on CUDA and TensorRT did not run here.
  For TensorRT the table says only whether the graph passes the exporter's checks of forms and operators.
  What did run on a GPU, Llama's form (float16, int4) and GPT-2's: [onnxruntime_cuda.md](onnxruntime_cuda.md),
  [tensorrt.md](tensorrt.md).
- *not built*, *not made*: the tool does not make that model, or not from what this version of transformers
  saves; onnxruntime-genai's model builder is {versions[onnxruntime-genai]}.

What an exporter left out of a model is not put back: the artifact is right for the model without it. Where a
config beside the graph still speaks of it, the export warns; `relay-attention verify --reference` shows it
in any case.

A family that is not listed is exported if its attention goes through transformers' attention interface (or
torch's `scaled_dot_product_attention`) with causal or windowed masks; nothing is keyed on names.
"""
_FILES = """
## ONNX files of other tools

On ONNX Runtime on the CPU; none of these ran on a GPU. What is *refused* ends with the words below.

- *genai*: onnxruntime-genai's builder; float16 has GroupQueryAttention for CUDA, MultiHeadAttention for the
  CPU. int4 is *right* where greedy tokens are those of the builder's graph running every request in full.
- *optimum*: what optimum {optimum} makes for `text-generation-with-past`.
- *torch*: `torch.onnx.export` of a model with past keys and values, by opset (Attention nodes from 23 on),
  and through TorchScript. Gemma 2 with `attn_implementation="eager"`: torch's own attention has no softcap.
"""
_FORMS = """
## Forms of attention

In decoders that the tests write node by node (`tests/e2e/test_forms.py`), on ONNX Runtime on the CPU:
*right* where greedy tokens over a ragged batch are those that the decoder's own graph gives for every request
in full.
"""


@dataclass
class Row:
    """title: family and what is special about it. results: source -> "right" or what else.

    tensorrt: what the checks for TensorRT say. files: ONNX file's source -> outcome and its reason.
    refusal: why it is not exported, or None.
    """

    title: str
    architecture: str = ""
    results: dict[str, str] = field(default_factory=dict)
    tensorrt: str = ""
    files: dict[str, tuple[str, str]] = field(default_factory=dict)
    refusal: str | None = None


@dataclass
class ModelsTable:
    """rows: by the family's key, in the order in which they were tested. forms: name -> (outcome, reason)."""

    rows: dict[str, Row] = field(default_factory=dict)
    forms: dict[str, tuple[str, str]] = field(default_factory=dict)

    def row(self, family: str, title: str) -> Row:
        return self.rows.setdefault(family, Row(title))

    def lines(self, sources: list[str]) -> Iterator[str]:
        """All of the document behind its head. sources: columns of the table of ONNX files."""
        exported = [row for row in self.rows.values() if row.refusal is None]
        yield (
            "| family | architecture | "
            + "".join(f"{each}, CPU | " for each in SOURCES)
            + "CUDA | TensorRT |"
        )
        yield "|---" * (4 + len(SOURCES)) + "|"
        yield from map(_folders, exported)
        yield _FILES
        yield "| family | " + " | ".join(sources) + " |"
        yield "|---" * (1 + len(sources)) + "|"
        for row in exported:
            yield f"| {row.title} | " + " | ".join(row.files[source][0] for source in sources) + " |"
        yield ""
        for row in exported:
            for reason in dict.fromkeys(reason for _, reason in row.files.values() if reason):
                holding = [source for source in sources if row.files[source][1] == reason]
                yield f"- {row.title}; {', '.join(holding)}; {row.files[holding[0]][0]}: {reason}"
        yield _FORMS
        yield "| form | outcome |"
        yield "|---|---|"
        yield from (_form(*each) for each in self.forms.items())
        yield from ("", "## Refused", "", "The export ends with these words, and writes nothing.", "")
        yield "| family | architecture | reason |"
        yield "|---|---|---|"
        yield from (_refusal(row) for row in self.rows.values() if row.refusal is not None)

    def missing(self, written: str, sources: list[str]) -> list[str]:
        """What was found and is not in the document. Cases that were not run are not missed."""
        lines = written.splitlines()
        wanted = [_refusal(row) for row in self.rows.values() if row.refusal is not None]
        wanted += [_folders(row) for row in self.rows.values() if set(row.results) == set(SOURCES)]
        wanted += [_form(*each) for each in self.forms.items()]
        missing = [line for line in wanted if line not in lines]
        files = lines[lines.index("## ONNX files of other tools") :]
        for row in self.rows.values():
            cells = next((line.split(" | ") for line in files if line.startswith(f"| {row.title} | ")), [])
            for source, (outcome, reason) in row.files.items():
                place = sources.index(source) + 1
                if place >= len(cells) or cells[place].removesuffix(" |") != outcome:
                    missing.append(f"{row.title}, {source}: {outcome}")
                if reason and not any(line.endswith(f"{outcome}: {reason}") for line in files):
                    missing.append(f"{row.title}, {source}: {reason}")
        return missing

    def markdown(self, versions: dict[str, str], optimum: str, sources: list[str]) -> str:
        head = _HEAD.format(versions=versions, command=COMMAND)
        body = "\n".join(self.lines(sources)).replace("{optimum}", optimum)
        return f"{head}\n{body}\n{made_with(versions)}"


def made_with(versions: dict[str, str]) -> str:
    """The end of the document."""
    return f"\nMade with {', '.join(f'{name} {version}' for name, version in versions.items())}.\n"


def _folders(row: Row) -> str:
    results = " | ".join(row.results[source] for source in SOURCES)
    return f"| {row.title} | {row.architecture} | {results} | not run | {row.tensorrt}, not run |"


def _form(name: str, found: tuple[str, str]) -> str:
    outcome, reason = found
    return f"| {name} | {outcome}: {reason} |" if reason else f"| {name} | {outcome} |"


def _refusal(row: Row) -> str:
    return f"| {row.title} | {row.architecture} | {row.refusal} |"
