"""Finding checkpoints: directories, hub ids in the client's cache, and what is said without a network."""

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from moe_jax.checkpoints import CheckpointError
from moe_jax.checkpoints.hub import FILES, SUBFOLDERS, resolve


def test_directories_are_taken_as_they_are(toy, monkeypatch):
    toy.write()
    assert resolve(toy.directory) == toy.directory
    monkeypatch.setenv("HOME", str(toy.directory.parent))
    assert resolve("~/toy") == toy.directory
    monkeypatch.chdir(toy.directory.parent)
    assert resolve("toy").samefile(toy.directory)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"got nothing"):
        resolve(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"got PyTorch files only, .*Convert them where torch is: .*save_pretrained"
    ):
        resolve(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"expected a directory .* got the file .*pytorch_model.bin: pass its directory"
    ):
        resolve(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["/no/such/place", "./here", "a/b/c", "bad id/x"])
def test_what_is_neither_path_nor_id(name):
    with pytest.raises(
        CheckpointError, match=r"expected a local directory or a hub id such as .* got .*: no such directory"
    ):
        resolve(name)


def test_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        resolve("nobody/nothing")
    message = str(error.value)
    assert "got 'nobody/nothing': no such directory here, and it could not be downloaded" in message
    assert "Try a directory with config.json and model.safetensors, or `hf download nobody/nothing`" in message


def test_hub_id_without_network_does_not_hang(monkeypatch, tmp_path):
    """Nobody listens on the port of the hub."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **options: real(*args, **options, endpoint=endpoint, cache_dir=tmp_path),
    )
    begin_s = time.monotonic()
    with pytest.raises(CheckpointError, match=r"got 'nobody/nothing'.* could not be downloaded .*hf download"):
        resolve("nobody/nothing", revision="main")
    assert time.monotonic() - begin_s < 20


def test_downloads_neither_pickles_nor_code_nor_second_copies(monkeypatch, toy):
    toy.write()
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(toy.directory)
    )
    assert resolve("somebody/toy", revision="v1") == toy.directory
    assert asked["revision"] == "v1"
    repository = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    refused = ["pytorch_model.bin", "modeling_toy.py", "consolidated.safetensors", "original/model.safetensors", "a.pt"]
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects([*repository, *refused], allow_patterns=list(FILES), ignore_patterns=list(SUBFOLDERS))
    assert list(kept) == repository
