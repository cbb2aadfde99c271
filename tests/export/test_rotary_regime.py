from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from relay_attention.errors import ExportError
from relay_attention.export import export_model, make_prefix
from relay_attention.export.rotary_regime import Regime, fix_regime
from relay_attention.runtime.artifact import Artifact

SWITCH, POSITIONS = 64, 256


def _model() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    config = transformers.Phi3Config(
        **sizes, intermediate_size=32, max_position_embeddings=POSITIONS, pad_token_id=2, bos_token_id=0,
        eos_token_id=1, original_max_position_embeddings=SWITCH, rope_parameters=scaling,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _frequencies(model: transformers.PreTrainedModel, length: int) -> torch.Tensor:
    rotary = model.model.rotary_emb
    rotary(torch.zeros(1), torch.tensor([[0, length - 1]]))
    return rotary.inv_freq.clone()


@pytest.mark.parametrize(
    ("prefix", "max_context", "regime", "length"),
    [
        (40, 24, Regime(SWITCH), SWITCH),
        (40, None, Regime(SWITCH), SWITCH),  # max_context is then made as large as fits
        (SWITCH - 1, 1, Regime(SWITCH), SWITCH),
        (SWITCH, None, Regime(POSITIONS, SWITCH), SWITCH + 1),
        (100, 100, Regime(POSITIONS, SWITCH), POSITIONS),
    ],
)
def test_frequencies_are_those_of_every_request(
    prefix: int, max_context: int | None, regime: Regime, length: int
) -> None:
    model = _model()
    assert fix_regime(model, prefix, max_context, POSITIONS) == regime
    expected = _frequencies(_model(), length)
    # fixed: no length changes them any more
    for other in (1, SWITCH, SWITCH + 1, POSITIONS):
        assert torch.equal(_frequencies(model, other), expected)


def test_regimes_differ() -> None:
    assert not torch.equal(_frequencies(_model(), SWITCH), _frequencies(_model(), SWITCH + 1))


def test_requests_across_the_switch_are_refused_with_the_remedies() -> None:
    with pytest.raises(ExportError, match=r"after 64 tokens.*at most 24 or a system prompt of at least 64"):
        fix_regime(_model(), 40, 25, POSITIONS)


def test_dynamic_stays_within_the_positions(tiny) -> None:
    config = tiny.CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ExportError, match="after 512 tokens"):
        fix_regime(model, 500, 13, 1024)
    assert fix_regime(model, 40, None, 1024) == Regime(512)


def test_models_with_one_set_of_frequencies_are_left_alone(tiny) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama3-scaling"]())
    assert fix_regime(model, 1000, None, 512) == Regime(512)
    assert model.model.rotary_emb.rope_type == "llama3"


@pytest.fixture
def long_artifact(tiny, tmp_path: Path) -> Path:
    model = _model()
    model.save_pretrained(tmp_path / "model")
    tiny.make_tokenizer(tmp_path / "model")
    return export_model(tmp_path / "model", tiny.SYSTEM_PROMPT, tmp_path / "out", threads=1)


def test_a_prompt_too_short_for_the_regime_is_refused_later(tiny, long_artifact: Path) -> None:
    manifest = Artifact.open(long_artifact).manifest
    assert manifest.source["min_prefix"] == str(SWITCH)
    assert manifest.prefix.length >= SWITCH
    with pytest.raises(ExportError, match="at least 64 tokens"):
        make_prefix(long_artifact, "Be brief.", threads=1)
    assert np.array_equal(Artifact.open(long_artifact).manifest.prefix.token_ids, manifest.prefix.token_ids)
    make_prefix(long_artifact, tiny.SYSTEM_PROMPT + " Be brief.", threads=1)
