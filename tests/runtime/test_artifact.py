import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from relay_attention.errors import ArtifactError
from relay_attention.runtime.artifact import Artifact, Manifest, PrefixFile, PrefixHeader, token_sha256


@pytest.fixture
def folder(artifact, tmp_path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(artifact.path, tmp_path / "copy"))


def edit(folder: Path, change) -> None:
    data = json.loads((folder / "relay.json").read_text())
    change(data)
    (folder / "relay.json").write_text(json.dumps(data))


def edit_prefix(folder: Path, **changes) -> None:
    path = folder / "prefix.bin"
    raw = path.read_bytes()
    (length,) = struct.unpack("<I", raw[8:12])
    header = json.dumps(json.loads(raw[12 : 12 + length]) | changes).encode()
    packed = (b"RELAYPFX" + struct.pack("<I", len(header)) + header).ljust(4096, b"\0")
    path.write_bytes(packed + raw[4096:])


def test_manifest_round_trip(artifact):
    data = artifact.manifest.to_json()
    assert Manifest.from_json(json.loads(json.dumps(data))) == artifact.manifest
    assert data["prefix"]["token_sha256"] == token_sha256(data["prefix"]["token_ids"])
    assert token_sha256([1, 2]) == "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f"


def test_prefix_round_trip_and_alignment(tmp_path):
    header = PrefixHeader("id", "float16", 3, ((2, 8), (1, 16)), "hash")
    layers = [
        (np.full((heads, 3, dim), 1 + layer, np.float16), np.full((heads, 3, dim), -1 - layer, np.float16))
        for layer, (heads, dim) in enumerate(header.layers)
    ]
    file = PrefixFile.write(tmp_path / "prefix.bin", header, layers)
    assert file == PrefixFile.open(tmp_path / "prefix.bin")
    assert all(offset % 4096 == 0 for extent in file.extents() for offset in extent[:2])
    for (key, value), (expected_key, expected_value) in zip(file.read(), layers, strict=True):
        np.testing.assert_array_equal(key, expected_key)
        np.testing.assert_array_equal(value, expected_value)


def test_empty_prefix(tmp_path):
    header = PrefixHeader("id", "float32", 0, ((2, 8),), token_sha256([]))
    empty = np.zeros((2, 0, 8), np.float32)
    file = PrefixFile.write(tmp_path / "prefix.bin", header, [(empty, empty)])
    assert [key.shape for key, _ in file.read()] == [(2, 0, 8)]


def test_prefix_write_refuses_another_shape(tmp_path):
    header = PrefixHeader("id", "float32", 3, ((2, 8),), "hash")
    with pytest.raises(ValueError, match="does not fit"):
        PrefixFile.write(tmp_path / "p", header, [(np.zeros((2, 3, 8)), np.zeros((2, 3, 8)))])


def test_hashes(folder):
    Artifact.open(folder).check_hashes()
    raw = bytearray((folder / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "model.onnx").write_bytes(raw)
    artifact = Artifact.open(folder)  # sizes are right
    with pytest.raises(ArtifactError, match=r"model\.onnx: content is damaged"):
        artifact.check_hashes()


def test_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        Artifact.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="is a file"):
        Artifact.open(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"not a relay-attention artifact.*relay-attention export"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "prefix.bin", "tokenizer.json", "system_prompt.txt"])
def test_missing_and_truncated_file(folder, name):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:-1])
    with pytest.raises(
        ArtifactError, match=f"{name}: {len(raw) - 1} bytes, relay.json says {len(raw)}: truncated"
    ):
        Artifact.open(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        Artifact.open(folder)


def test_prefix_only(folder):
    for name in ("model.onnx", "tokenizer.json"):
        (folder / name).unlink()
    assert Artifact.open(folder, prefix_only=True).manifest.prefix.length > 0


def test_damaged_json(folder):
    (folder / "relay.json").write_text('{"format": ')
    with pytest.raises(ArtifactError, match=r"relay\.json: not valid JSON"):
        Artifact.open(folder)
    (folder / "relay.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"relay\.json: not valid JSON"):
        Artifact.open(folder)
    (folder / "relay.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"relay\.json: should be a JSON object"):
        Artifact.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format="other"), "not an artifact"),
        (
            lambda data: data.update(format_version=2),
            r"newer relay-attention \(format 2, this one reads 1\): upgrade",
        ),
        (lambda data: data.update(op_version=2), "version 2 of the RelayAttention op.*upgrade"),
        (
            lambda data: data.update(op_version=0),
            "version 0 of the RelayAttention op.*export the model again",
        ),
        (lambda data: data.pop("geometry"), "'geometry' is missing"),
        (lambda data: data.update(dtype="float8"), "'dtype' is 'float8', not one of"),
        (lambda data: data.update(max_context="many"), "'max_context' should be an integer"),
        (lambda data: data.update(max_context=0), "max_context is 0"),
        (lambda data: data.update(max_context=10**6), "exceed the model's 512 positions"),
        (lambda data: data["geometry"].update(head_dim=[8]), "head_dim has 1 entries for 2 layers"),
        (lambda data: data["geometry"].update(head_dim=[8, 0]), "head_dim has an entry below 1"),
        (lambda data: data["geometry"].update(head_dim=[8, True]), "list of integers"),
        (lambda data: data["geometry"].update(vocab_size=-5), "negative"),
        (lambda data: data["prefix"].update(length=3), "length is 3"),
        (lambda data: data["prefix"]["token_ids"].__setitem__(0, 5), "token_sha256 is not that of token_ids"),
        (lambda data: data["tokens"].update(eos=[10**6]), "outside the vocabulary"),
        (lambda data: data["files"].pop("model.onnx"), r"model\.onnx is not listed"),
        (lambda data: data["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "not a plain file name"),
        (lambda data: data["io"].pop("logits"), "'logits' is missing"),
    ],
)
def test_manifest_errors(folder, change, message):
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message) as error:
        Artifact.open(folder)
    assert "relay.json" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "f" * 64}, "computed by another model"),
        ({"token_sha256": "f" * 64}, "holds another prefix"),
        ({"prefix_length": 5}, "holds another prefix"),
        ({"layers": [[2, 8]]}, "layers is"),
        ({"layers": [[2, "8"]]}, "layers should be"),
        ({"dtype": "float16"}, "dtype is float16, the model's is float32"),
        ({"op_version": 2}, "version 2 of the RelayAttention op"),
        ({"format_version": 2}, "made by a newer relay-attention"),
        ({"prefix_length": 10**6}, "truncated or damaged"),
    ],
)
def test_prefix_of_something_else(folder, changes, message):
    edit_prefix(folder, **changes)
    size = (folder / "prefix.bin").stat().st_size
    edit(folder, lambda data: data["files"]["prefix.bin"].update(bytes=size))
    with pytest.raises(ArtifactError, match=message) as error:
        Artifact.open(folder)
    assert "prefix.bin" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a prefix file"),
        (b"SOMETHINGELSE", "not a prefix file"),
        (b"RELAYPFX\xff\xff\xff\xff", "truncated or damaged"),
        (b"RELAYPFX\x02\x00\x00\x00{]", "header is not valid JSON"),
        (b"RELAYPFX\x02\x00\x00\x00\xff\xff", "header is not valid JSON"),
    ],
)
def test_damaged_prefix(tmp_path, content, message):
    (tmp_path / "prefix.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        PrefixFile.open(tmp_path / "prefix.bin")
