from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from relay_attention.cli import main
from relay_attention.runtime.artifact import Artifact


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("You are kind.")
    return path


def test_export_then_a_new_prefix(
    genai_llama: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["export", str(genai_llama), "--system-prompt", str(prompt_file), "-o", str(output)]
    assert main([*command, "--max-context", "64", "--prefix", "input", "--all-logits", "--threads", "2"]) == 0
    assert "max_context 64" in capsys.readouterr().err
    manifest = Artifact.open(output).manifest
    assert (manifest.max_context, manifest.prefix.mode, manifest.logits) == (64, "input", "all")
    prompt_file.write_text("You are brief, and kind as well.")
    assert main(["prefix", str(output), "--system-prompt", str(prompt_file)]) == 0
    renewed = Artifact.open(output).manifest
    assert renewed.prefix.length > manifest.prefix.length
    assert (renewed.max_context, renewed.prefix.mode, renewed.logits) == (64, "input", "all")


def test_errors_are_sentences_and_status_2(
    genai_llama: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    prompt_file.write_text("")
    command = ["export", str(genai_llama), "--system-prompt", str(prompt_file), "-o", str(output)]
    assert main(command) == 2
    assert capsys.readouterr().err == f"relay-attention: error: {prompt_file}: the system prompt is empty\n"
    assert main(["export", str(tmp_path / "none"), *command[2:]]) == 2
    assert main(["prefix", str(output), "--system-prompt", str(prompt_file)]) == 2
    assert not output.exists()


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, relay_attention.export, relay_attention.export.commands;"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_a_prefix_needs_neither_torch_nor_transformers(
    genai_llama: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Nor onnx-ir: the box that serves the model can bake a new prompt."""
    output = tmp_path / "out"
    assert main(["export", str(genai_llama), "--system-prompt", str(prompt_file), "-o", str(output)]) == 0
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx_ir', 'onnxscript', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from relay_attention.cli import main\n"
        f"sys.exit(main(['prefix', {str(output)!r}, '--system-prompt', {str(prompt_file)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_can_be_imported_from_the_package_again_and_again() -> None:
    import relay_attention.export.verification  # noqa: F401 (a module's import must not hide a function)
    from relay_attention.export import VerifyReport, export_model, make_prefix, verify

    assert all(callable(each) for each in (VerifyReport, export_model, make_prefix, verify))
    with pytest.raises(ImportError):
        from relay_attention.export import nothing  # noqa: F401
