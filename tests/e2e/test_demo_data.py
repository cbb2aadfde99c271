"""The demo's model folder and directory generator: what every end-to-end test and the quickstart stand on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "directory"
MODEL = DEMO / "model"
sys.path.insert(0, str(DEMO))
import evaluate  # noqa: E402
import make_directory as data  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def render(system: str, user: str) -> str:
    """The chat template in plain jinja2, as the runtime renders it."""
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(config["chat_template"]).render(
        messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
        add_generation_prompt=True,
    )


def test_folder_is_small_and_standard():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    standard = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(sizes) == standard | {"tokenizer_config.json"}
    assert sum(sizes.values()) <= 4_000_000
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] % 8 == 0
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["max_position_embeddings"] >= 4096


def test_directory_is_made_from_its_seed(tmp_path):
    command = [sys.executable, str(DEMO / "make_directory.py"), "--seed", "5", "--entries", "240", "-o"]
    for run in "12":  # the hash seed of the interpreter must not matter
        subprocess.run(
            [*command, str(tmp_path / run)], check=True, env={**os.environ, "PYTHONHASHSEED": run}, timeout=60
        )
    prompt, requests = data.make_directory(5, 240)
    for run in "12":
        assert (tmp_path / run / "system_prompt.txt").read_text(encoding="utf-8") == prompt + "\n"
        lines = (tmp_path / run / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == requests
    assert data.make_directory(6, 240)[0] != prompt


def test_answers_stand_only_in_the_system_prompt():
    prompt, requests = data.make_directory(5)
    lines = prompt.splitlines()
    assert len(requests) == 32
    assert len({line.rsplit(" ", 1)[0] for line in lines[1:]}) == 224, "full names must be unique"
    for request in requests:
        assert not any(character.isdigit() for character in request["prompt"])
        matches = [line for line in lines[1:] if line.rsplit(" ", 1)[0] in request["prompt"]]
        assert [line.rsplit(" ", 1)[1] for line in matches] == [request["expected"]]


def test_training_pairs_leave_some_out():
    assert len(data.TRAINING_PAIRS) == 9000
    assert len(data.HELD_OUT_PAIRS) == 1000
    assert not set(data.TRAINING_PAIRS) & set(data.HELD_OUT_PAIRS)
    firsts, lasts = (set(names) for names in zip(*data.HELD_OUT_PAIRS, strict=True))
    assert len(firsts) == len(lasts) == 100, "every name is in some held-out pair"


def test_prompt_is_long_and_shared_up_to_the_users_text(tokenizer):
    prompt, requests = data.make_directory(9)
    rows = [tokenizer.encode(render(prompt, r["prompt"]), add_special_tokens=False).ids for r in requests]
    columns = enumerate(zip(*rows, strict=False))
    shared = rows[0][: next(index for index, column in columns if len(set(column)) > 1)]
    assert shared[-1] == tokenizer.token_to_id("<|user|>"), (
        "the boundary must be where the user's text starts"
    )
    assert 1500 <= len(shared) <= 2000
    for row, request in zip(rows, requests, strict=True):
        assert tokenizer.decode(row[len(shared) :], skip_special_tokens=True) == request["prompt"]


def test_transformers_and_plain_tokenizers_agree(tokenizer, transformers_tokenizer):
    prompt, requests = data.make_directory(2, entries=20, requests=8)
    texts = [request["prompt"] for request in requests]
    texts += [
        "",
        "  spaces\t and\n\nlines ",
        "Zoë 日本語 🙂 naïve",
        "<|end|> typed by the user",
        "4821 48 21",
    ]
    for text in texts:
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": text}]
        theirs = transformers_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ours = tokenizer.encode(render(prompt, text), add_special_tokens=False).ids
        assert ours == theirs


@pytest.mark.parametrize(
    "text", ["Alice Stone 4821\n", " a  b\t\r\n", "Zoë 日本語 🙂", "\x00\x7f", "don't 12345"]
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_model_answers_from_a_directory_it_never_saw(transformers_tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    prompt, requests = data.make_directory(seed=77, pairs=data.HELD_OUT_PAIRS)
    answers = evaluate.answer(model, transformers_tokenizer, prompt, [r["prompt"] for r in requests])
    right = sum(a == r["expected"] for a, r in zip(answers, requests, strict=True))
    assert right >= 31, list(zip(answers, requests, strict=True))
    # Another directory, the same questions: a model that knew the answers by heart would repeat them.
    other = prompt.translate(str.maketrans("0123456789", "1234567890"))
    moved = evaluate.answer(model, transformers_tokenizer, other, [r["prompt"] for r in requests])
    expected = [r["expected"].translate(str.maketrans("0123456789", "1234567890")) for r in requests]
    assert sum(a == e for a, e in zip(moved, expected, strict=True)) >= 31
