"""The commands as a user runs them, in processes of their own."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay_attention.runtime import RelayDecoder, SamplingParams

COMMAND = [sys.executable, "-m", "relay_attention"]


def run(*arguments, stdin: str | None = None, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_imports_are_light():
    """The runtime needs numpy, tokenizers, jinja2 and tqdm; the engine only when it is loaded."""
    program = (
        "import sys, relay_attention.runtime, relay_attention.runtime.commands\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'onnxscript', 'safetensors', 'tensorrt'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_decoding_needs_no_model_tools(artifact):
    program = (
        "import sys\n"
        "from relay_attention.runtime import RelayDecoder, SamplingParams\n"
        f"with RelayDecoder.load({str(artifact.path)!r}, threads=1) as decoder:\n"
        "    params = SamplingParams(max_new_tokens=2, ignore_eos=True)\n"
        "    assert decoder.generate(['hello'], params)[0].token_ids\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript', 'safetensors'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect(artifact):
    out = run("inspect", artifact.path, "--check").stdout
    prefix = artifact.manifest.prefix
    for words in (
        "TinyForCausalLM",
        f"{prefix.length} tokens, static, chat",
        "model.onnx",
        "every file is as it was",
    ):
        assert words in out
    data = json.loads(run("inspect", artifact.path, "--json").stdout)
    assert data["prefix"]["token_ids"] == list(prefix.token_ids)
    assert data["path"] == str(artifact.path)


def test_inspect_of_damage(artifact, tmp_path):
    folder = Path(shutil.copytree(artifact.path, tmp_path / "copy"))
    raw = bytearray((folder / "prefix.bin").read_bytes())
    raw[-1] ^= 1
    (folder / "prefix.bin").write_bytes(raw)
    run("inspect", folder)
    assert "prefix.bin: content is damaged" in run("inspect", folder, "--check", code=2).stderr
    assert "no such folder" in run("inspect", tmp_path / "none", code=2).stderr


def test_generate_lines_and_objects(artifact, tmp_path):
    prompts = tmp_path / "prompts"
    objects = [
        {"prompt": "hello", "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"token_ids": [5, 6, 7], "temperature": 1.0, "seed": 3, "logprobs": 1},
    ]
    prompts.write_text("hello\n\n" + "\n".join(map(json.dumps, objects)) + "\r\né 中\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    numbers = ("--max-new-tokens", 6, "--max-batch", 2, "--mapped-weights")
    done = run("generate", artifact.path, "--prompts", prompts, "-o", out, *numbers)
    assert done.stdout == ""
    results = lines(out.read_text(encoding="utf-8"))
    with RelayDecoder.load(artifact.path, max_batch=2) as decoder:
        six = SamplingParams(max_new_tokens=6)
        expected = decoder.generate(
            ["hello", "hello", "hello", [5, 6, 7], "é 中"],
            [
                six,
                SamplingParams(max_new_tokens=3),
                six,
                SamplingParams(max_new_tokens=6, temperature=1.0, seed=3, logprobs=1),
                six,
            ],
        )
    assert [result["index"] for result in results] == [0, 1, 2, 3, 4]
    for result, wanted in zip(results, expected, strict=True):
        assert (result["text"], result["token_ids"]) == (wanted.text, wanted.token_ids)
        assert (result["finish_reason"], result["stop"]) == (wanted.finish_reason, wanted.stop)
        assert result["prompt_tokens"] == wanted.prompt_tokens
    assert [len(results[3]["token_ids"])] * 2 == [len(results[3]["logprobs"]), len(expected[3].logprobs)]
    assert "logprobs" not in results[0]
    assert list(tmp_path.glob("*.partial")) == []


def test_generate_hands_on_what_identifies_a_request(artifact):
    prompts = '{"prompt": "a", "id": "x-1", "expected": "4"}\nplain\n'
    found = lines(
        run("generate", artifact.path, "--prompts", "-", "--max-new-tokens", 1, stdin=prompts).stdout
    )
    assert (found[0]["id"], found[0]["expected"]) == ("x-1", "4")
    assert "id" not in found[1]


def test_generate_standard_streams(artifact):
    options = (
        "--temperature",
        1.2,
        "--seed",
        5,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--stop",
        "e",
    )
    arguments = ("generate", artifact.path, "--prompts", "-", "--max-new-tokens", 8, "--threads", 1, *options)
    first = run(*arguments, stdin="hello\nhello\n")
    second = run(*arguments, stdin="hello\nhello\n")
    assert first.stdout == second.stdout
    results = lines(first.stdout)
    assert results[0]["token_ids"] != results[1]["token_ids"], "request i draws with seed + i"
    assert all("e" not in result["text"] for result in results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('hello\n{"prompt": \n', ":2: Expecting value"),
        ('\n{"text": "x"}\n', ':2: one of "prompt", "messages" and "token_ids" is needed'),
        ('{"prompt": "x", "token_ids": [1]}', ':1: one of "prompt"'),
        ('{"prompt": "x", "heat": 1}', ":1: heat: unknown"),
        ('{"prompt": "x", "top_p": 3}', ":1: top_p is 3"),
        ('a\n{"token_ids": [1000000]}', ":2: the prompt: token id 1000000 is not in the vocabulary"),
        ('a\n{"prompt": 7}', ":2: the prompt is int 7"),
        ("a\n" + "long " * 100, ":2: the prompt has"),
        ("\n \n", ": holds no prompt"),
        (b"\xff\xff", ": not UTF-8"),
    ],
)
def test_generate_bad_lines(artifact, tmp_path, content, message):
    file, out = tmp_path / "prompts", tmp_path / "out"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    out.write_text("an earlier result")
    done = run("generate", artifact.path, "--prompts", file, "-o", out, code=2)
    assert f"{file}{message}" in done.stderr
    assert out.read_text() == "an earlier result"


def test_generate_reports_many_bad_lines(artifact):
    done = run("generate", artifact.path, "--prompts", "-", stdin="{\n" * 30, code=2)
    assert done.stderr.count("Expecting property name") == 10
    assert "and 20 more" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "none.txt"), "none.txt: cannot be read"),
        (("--prompts", "-", "--backend", "tpu"), "no backend 'tpu'"),
        (("--prompts", "-", "--max-batch", "0"), "max_batch is 0"),
        (("--prompts", "-", "--temperature", "-1"), "temperature is -1"),
        (("--prompts", "-", "--max-context", "100000"), "exceed the model's 512 positions"),
        (("--prompts", "-", "-o", "no/such/folder/x"), "cannot be written"),
    ],
)
def test_generate_bad_options(artifact, options, message):
    assert message in run("generate", artifact.path, *options, stdin="hello\n", code=2).stderr


def test_ctrl_c_keeps_what_is_finished(artifact, tmp_path):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    short = '{"token_ids": [1, 2], "max_new_tokens": 3}\n'
    prompts.write_text(short + '{"token_ids": [3], "max_new_tokens": 400}\n' * 300)
    options = ("--max-batch", "2", "--threads", "1", "--ignore-eos", "--max-context", "340")
    process = subprocess.Popen(
        [*COMMAND, "generate", artifact.path, "--prompts", prompts, "-o", out, *options],
        stderr=subprocess.PIPE,
        text=True,
        # what a shell runs in the background ignores it, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.read_text().count("\n")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not out.exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    results = lines(out.read_text())
    assert [result["index"] for result in results] == list(range(301))
    assert results[0]["finish_reason"] == "length"
    assert results[-1]["finish_reason"] == "aborted"
    finished = sum(result["finish_reason"] != "aborted" for result in results)
    assert f"interrupted, {finished} of 301 are finished" in errors
    assert not partial.exists()


def test_full_disk(artifact):
    """What cannot be written is an error with the name of the output."""
    command = " ".join([*COMMAND, "generate", str(artifact.path), "--prompts", "-", "--max-new-tokens", "2"])
    done = subprocess.run(
        ["bash", "-c", f"echo hello | {command} > /dev/full"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr == "relay-attention: error: standard output: cannot be written: No space left on device\n"
    )


def test_closed_pipe(artifact):
    """A reader that has enough (head) is no error worth a traceback."""
    command = " ".join([*COMMAND, "generate", str(artifact.path), "--prompts", "-", "--max-new-tokens", "2"])
    script = f"yes hello | head -200 | {command} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert len(lines(done.stdout)) == 1
    assert "Traceback" not in done.stderr
