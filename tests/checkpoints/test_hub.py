"""Finding checkpoints: directories, hub ids in the client's cache, and what is said without a network."""

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from moe_jax.checkpoints import CheckpointError, hub
from moe_jax.checkpoints.hub import FILES, SUBFOLDERS, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The hub client's cache: one checkpoint at one commit, as the client lays it out."""
    repository = tmp_path / "hub" / "models--somebody--toy"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.fixture(params=["offline mode", "nobody listens", "nobody answers"])
def no_network(request, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "nobody answers":
            server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline mode")
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
        yield
    huggingface_hub.close_session()


def test_without_network_an_id_comes_from_the_cache(cache, no_network):
    assert resolve("somebody/toy") == cache
    assert resolve("somebody/toy", revision=COMMIT) == cache


def test_without_network_an_unknown_id_is_refused_at_once(cache, no_network):
    begin_s = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        resolve("nobody/nothing")
    assert time.monotonic() - begin_s < 10
    message = str(error.value)
    assert "got 'nobody/nothing': no such directory here, and it is not in the hub client's cache" in message
    assert "the hub cannot be reached (" in message
    assert "Try a directory with config.json and model.safetensors, or `hf download nobody/nothing`" in message


def test_downloads_neither_pickles_nor_code_nor_second_copies():
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    others = ["pytorch_model.bin", "modeling_toy.py", "consolidated.safetensors", "original/model.safetensors", "a.pt"]
    kept = filter_repo_objects([*wanted, *others], allow_patterns=list(FILES), ignore_patterns=list(SUBFOLDERS))
    assert list(kept) == wanted
