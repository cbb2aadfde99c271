"""Bad input is refused with the node's name, the argument and its value; nothing crashes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from op_harness import Case, make_model, make_session, run

from relay_attention import plugins
from relay_attention.errors import BackendError
from relay_attention.plugins import schema

Inputs = dict[str, np.ndarray]

BASE = {"num_heads": 4, "kv_num_heads": 2}


def drop_last_dim(name: str, count: int = 1) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs[name] = np.ascontiguousarray(inputs[name][..., :-count])

    return change


def put(name: str, index: int, value: int) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs[name][index] = value

    return change


def cut_rows(name: str) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs[name] = np.ascontiguousarray(inputs[name][:-1])

    return change


def cut_axis_one(name: str) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs[name] = np.ascontiguousarray(inputs[name][:, :-1])

    return change


RUN_TIME: list[tuple[str, Callable[[Inputs], None], list[str]]] = [
    ("query width", drop_last_dim("query", 2), ["query has shape [3, 2, 126]", "num_heads = 4"]),
    ("head_dim not a multiple of 8", drop_last_dim("query", 4), ["head_dim = 31", "multiple of 8"]),
    ("key width", drop_last_dim("key"), ["key has shape [3, 2, 63]", "[3, 2, 64]"]),
    ("value length", cut_axis_one("value"), ["value has shape [3, 1, 64]", "[3, 2, 64]"]),
    ("past batch", cut_rows("past_key"), ["past_key has shape [2, 2, 48, 32]", "[3, 2, max_context, 32]"]),
    ("past value", cut_axis_one("past_value"), ["past_value has shape [3, 1, 48, 32]"]),
    ("context_lens count", cut_rows("context_lens"), ["context_lens has shape [2]", "[3]"]),
    ("query_lens count", cut_rows("query_lens"), ["query_lens has shape [2]", "[3]"]),
    ("prefix heads", cut_rows("prefix_key"), ["prefix_key has shape [1, 70, 32]", "[2, prefix_length, 32]"]),
    (
        "prefix value length",
        cut_axis_one("prefix_value"),
        ["prefix_value has shape [2, 69, 32]", "[2, 70, 32]"],
    ),
    (
        "rotary dims",
        lambda inputs: inputs.update(cos_cache=np.zeros((200, 17), np.float32)),
        ["cos_cache", "200, 17"],
    ),
    ("rotary pair", drop_last_dim("sin_cache"), ["sin_cache has shape [118, 15]", "[118, 16]"]),
    ("negative context", put("context_lens", 1, -1), ["context_lens[1] = -1", "negative"]),
    ("negative query", put("query_lens", 2, -5), ["query_lens[2] = -5", "negative"]),
    ("query beyond sequence", put("query_lens", 0, 3), ["query_lens[0] = 3", "sequence length 2"]),
    (
        "cache overflow",
        put("context_lens", 2, 48),
        ["context_lens[2] = 48", "query_lens[2] = 1", "max_context = 48"],
    ),
    ("context overflow alone", put("context_lens", 0, 2**31 - 1), ["context_lens[0] = 2147483647"]),
    (
        "beyond rotary cache",
        lambda inputs: inputs.update(
            cos_cache=inputs["cos_cache"][:80].copy(), sin_cache=inputs["sin_cache"][:80].copy()
        ),
        ["row 2", "position 110", "80 positions"],
    ),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in RUN_TIME], ids=[row[0] for row in RUN_TIME])
def test_run_time_errors(change: Callable[[Inputs], None], words: list[str]) -> None:
    case = Case(sequence=2, rotary_dim=32)
    inputs = case.make_inputs()
    change(inputs)
    with pytest.raises(Exception, match="RelayAttention node 'attention_7'") as error:
        run(case.session(), inputs)
    for word in words:
        assert word in str(error.value)


def test_a_session_works_on_after_an_error() -> None:
    case = Case()
    inputs = case.make_inputs()
    bad = {**inputs, "query_lens": np.array([9, 9, 9], np.int32)}
    with pytest.raises(Exception, match="query_lens"):
        run(case.session(), bad)
    case.check()


ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 0}, "num_heads = 0"),
    ({"num_heads": 5}, "num_heads = 5 is not a multiple of kv_num_heads = 2"),
    ({"kv_num_heads": -2}, "kv_num_heads = -2"),
    ({"scale": -1.0}, "scale = -1"),
    ({"scale": float("nan")}, "scale = nan"),
    ({"scale": 1}, "attribute scale must be a float"),
    ({"softcap": -0.5}, "softcap = -0.5"),
    ({"softcap": float("inf")}, "softcap = inf"),
    ({"local_window_size": 0}, "local_window_size = 0"),
    ({"local_window_size": -2}, "local_window_size = -2"),
    ({"local_window_size": 3.0}, "attribute local_window_size must be an integer"),
    ({"do_rotary": 2}, "do_rotary = 2"),
    ({"do_rotary": 1}, "the node has 9 inputs, expected 11"),
    ({"rotary_interleaved": 7}, "rotary_interleaved = 7"),
]


@pytest.mark.parametrize(("attributes", "message"), ATTRIBUTES, ids=[row[1] for row in ATTRIBUTES])
def test_attribute_errors_when_the_session_is_made(attributes: dict[str, Any], message: str) -> None:
    model = make_model({**BASE, **attributes}, "float32", schema.input_names(False))
    with pytest.raises(Exception, match="RelayAttention node 'attention_7'") as error:
        make_session(model)
    assert message in str(error.value)


def test_required_attributes() -> None:
    with pytest.raises(Exception, match="num_heads = 0 must be at least 1"):
        make_session(make_model({"kv_num_heads": 2}, "float32", schema.input_names(False)))


def test_rotary_inputs_without_rotary() -> None:
    model = make_model({**BASE, "do_rotary": 0}, "float32", schema.input_names(True))
    with pytest.raises(Exception, match="the node has 11 inputs, expected 9"):
        make_session(model)


def test_head_dim_known_when_the_session_is_made() -> None:
    model = make_model(BASE, "float32", schema.input_names(False), {"query": ["batch", "sequence", 4 * 12]})
    with pytest.raises(Exception, match="head_dim = 12"):
        make_session(model)
    model = make_model(BASE, "float32", schema.input_names(False), {"query": ["batch", "sequence", 4 * 264]})
    with pytest.raises(Exception, match="head_dim = 264"):
        make_session(model)


def test_mixed_types_are_refused() -> None:
    import onnx

    model = onnx.load_model_from_string(make_model(BASE, "float32", schema.input_names(False)))
    model.graph.input[7].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(Exception, match=r"attention_7|RelayAttention"):
        make_session(model.SerializeToString())


def test_unknown_target_is_refused() -> None:
    with pytest.raises(Exception, match="RELAY_ATTENTION_CPU_TARGET=mmx is not an instruction set"):
        make_session(make_model(BASE, "float32", schema.input_names(False)), target="mmx")


def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match="RELAY_ATTENTION_LIBRARY"):
        plugins.library_path()
    monkeypatch.delenv(plugins.LIBRARY_VARIABLE)
    with pytest.raises(BackendError, match="build_native"):
        plugins.library_path("libmissing.so")


def test_library_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "other.so"
    file.write_bytes(b"")
    monkeypatch.setenv(plugins.LIBRARY_VARIABLE, os.fspath(file))
    assert plugins.library_path() == file
