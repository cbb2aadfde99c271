"""docs/models.md: family by source by backend, from what the tests of families found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs" / "models.md"
SOURCES = ("Hugging Face folder", "onnxruntime-genai folder")
_HEAD = """# Models

Made by the tests themselves: `pytest tests/e2e/test_families.py --models-table` writes this file, and the
tests fail if it is not what they found. Every case is a tiny model with random weights and a prefix of more
than three windows.

- *right*: greedy tokens over a ragged batch are those of transformers running every request in full, and all
  logits are within the tolerance of `relay-attention verify` ([the rule](export.md#the-rule-of-verify)).
- CPU is ONNX Runtime on the CPU, which ran. ONNX Runtime on CUDA and TensorRT did not run here.
  For TensorRT the table says only whether the graph passes the exporter's checks of forms and operators.
- *not built*: onnxruntime-genai's model builder ({versions[onnxruntime-genai]}) does not make that model, or
  not from what this version of transformers saves.

A family that is not listed is exported if its attention goes through transformers' attention interface (or
torch's `scaled_dot_product_attention`) with causal or windowed masks; nothing is keyed on names.
ONNX files of other tools: [export.md](export.md).
"""


@dataclass
class Row:
    """title: family and what is special about it. results: source -> "right" or what else.

    tensorrt: what the checks for TensorRT say. refusal: why it is not exported, or None.
    """

    title: str
    architecture: str = ""
    results: dict[str, str] = field(default_factory=dict)
    tensorrt: str = ""
    refusal: str | None = None


@dataclass
class ModelsTable:
    """Rows by the family's key, in the order in which they were tested."""

    rows: dict[str, Row] = field(default_factory=dict)

    def row(self, family: str, title: str) -> Row:
        return self.rows.setdefault(family, Row(title))

    def markdown(self, versions: dict[str, str]) -> str:
        lines = [_HEAD.format(versions=versions)]
        lines += ["| family | architecture | " + " | ".join(f"{source}, CPU" for source in SOURCES), ""]
        lines[-2] += " | CUDA | TensorRT |"
        lines[-1] = "|---" * (4 + len(SOURCES)) + "|"
        exported = [row for row in self.rows.values() if row.refusal is None]
        for row in exported:
            results = " | ".join(row.results.get(source, "not run") for source in SOURCES)
            lines.append(
                f"| {row.title} | {row.architecture} | {results} | not run | {row.tensorrt}, not run |"
            )
        lines += ["", "## Refused", "", "The export ends with these words, and writes nothing.", ""]
        lines += ["| family | architecture | reason |", "|---|---|---|"]
        for row in self.rows.values():
            if row.refusal is not None:
                lines.append(f"| {row.title} | {row.architecture} | {row.refusal} |")
        made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
        return "\n".join([*lines, "", f"Made with {made_with}.", ""])
