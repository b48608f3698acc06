"""The reader and writer against the safetensors library, and files that are broken."""

import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from moe_jax.checkpoints import CheckpointError
from moe_jax.checkpoints.safetensors import DTYPES, read_contents, read_header, write

THEIRS = [name for name in DTYPES if "FNUZ" not in name]  # the library's numpy side lacks these two


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, (*shape, DTYPES[name].itemsize), np.uint8)
    return bits.view(DTYPES[name]).reshape(shape)


@pytest.mark.parametrize("name", THEIRS)
def test_reads_what_the_library_writes(tmp_path, name):
    written = {"matrix": _random(name, (5, 3)), "scalar": _random(name, ()), "empty": _random(name, (0, 4))}
    save_file(written, tmp_path / "model.safetensors")
    tensors = read_contents(tmp_path).tensors
    for key, expected in written.items():
        values, release = tensors[key].mapped()
        release()
        assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(_bits(values), _bits(expected))


@pytest.mark.parametrize("name", DTYPES)
def test_the_library_reads_what_we_write(tmp_path, name):
    written = {"a": _random(name, (5, 3)), "b": _random(name, (7,))}
    file = tmp_path / "x.safetensors"
    write(file, [(key, each.dtype, each.shape) for key, each in written.items()], iter(written.values()))
    for key, read in deserialize(file.read_bytes()):
        assert (read["dtype"], read["shape"]) == (name, list(written[key].shape))
        assert bytes(read["data"]) == written[key].tobytes()
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back(tmp_path, name):
    expected = _random(name, (4, 6))
    is_transposed_in_memory = expected.T.copy().T
    write(tmp_path / "x.safetensors", [("x", expected.dtype, expected.shape)], [is_transposed_in_memory])
    values, _ = read_header(tmp_path / "x.safetensors")[0]["x"].mapped()
    assert values.dtype == DTYPES[name]
    np.testing.assert_array_equal(_bits(values), _bits(expected))


def test_the_writer_keeps_promises(tmp_path):
    with pytest.raises(ValueError, match=r"x: expected float32 \[2\], got float32 \[3\]"):
        write(tmp_path / "x", [("x", np.dtype(np.float32), (2,))], [np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match=r"x: expected a dtype that safetensors has .*BF16.*, got int4"):
        write(tmp_path / "x", [("x", np.dtype(ml_dtypes.int4), (2,))], [])


def _write_raw(path, header, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "expected a safetensors header, got one that is not valid: JSONDecodeError"),
        (b"\xff\xfe", b"", "expected a safetensors header, got one that is not valid: UnicodeDecodeError"),
        (b"[]", b"", "expected a safetensors header, got one that is not valid: TypeError"),
        ({"x": {"dtype": "F32"}}, b"", "expected a safetensors header, got one that is not valid: KeyError"),
        ({"x": {**ENTRY, "dtype": "F4"}}, bytes(8), "x: expected a dtype of BOOL, .*, got F4"),
        ({"x": {**ENTRY, "shape": [-2]}}, bytes(8), "x: expected whole numbers for shape and bytes"),
        ({"x": {**ENTRY, "shape": [3]}}, bytes(8), r"x: expected 12 bytes for F32 \[3\], got 8"),
        ({"x": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "x: expected to begin at byte [0-9]+, got [0-9]+"),
        ({"x": ENTRY, "y": ENTRY}, bytes(8), "y: expected to begin at byte [0-9]+, got [0-9]+"),
        ({"x": ENTRY}, bytes(7), "truncated, expected 77 bytes, got 76; incomplete: x"),
        ({"x": ENTRY}, bytes(11), "expected 77 bytes, got 80: 3 belong to no tensor"),
    ],
)
def test_broken_files_say_how(tmp_path, header, data, message):
    _write_raw(tmp_path / "model.safetensors", header, data)
    problems = read_contents(tmp_path).problems
    assert len(problems) == 1
    assert problems[0].startswith("model.safetensors: ")
    assert re.search(message, problems[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.safetensors: truncated, expected at least 8 bytes, got 0"),
        (struct.pack("<Q", 50) + b"{}", "model.safetensors: truncated, expected a header of 58 bytes, got 10"),
        (b"version https://git-lfs.github.com/spec/v1", "model.safetensors: not a safetensors file, expected a header"),
    ],
)
def test_files_without_a_header(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    (problem,) = read_contents(tmp_path).problems
    assert problem.startswith(message)


def test_index_and_shards_must_agree(tmp_path):
    one = {"x": np.zeros(2, np.float32)}
    save_file(one, tmp_path / "0.safetensors")
    save_file({**one, "y": np.zeros(2, np.float32)}, tmp_path / "1.safetensors")
    weight_map = {"x": "0.safetensors", "y": "1.safetensors", "z": "1.safetensors", "w": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    contents = read_contents(tmp_path)
    assert set(contents.problems) == {
        "x: in both 0.safetensors and 1.safetensors",
        "z: model.safetensors.index.json places it in 1.safetensors, which does not have it",
        "2.safetensors: missing file, listed by model.safetensors.index.json",
    }
    assert contents.lost == {"w"}


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": {"x": "../other.safetensors"}}'])
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"expected JSON with a weight_map from tensor to file, got"):
        read_contents(tmp_path)


def test_other_files_are_not_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or .*index.json in .*, got nothing"):
        read_contents(tmp_path)
    (tmp_path / "expected.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"got expected.safetensors"):
        read_contents(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"got PyTorch files only.*Convert them where torch is"):
        read_contents(tmp_path)
