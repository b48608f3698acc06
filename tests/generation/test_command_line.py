"""The command line as a user meets it: text as it comes, one line for an error, a clean end on Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

import moe_jax


def command(name, *arguments, cache="off"):
    cached = () if name == "info" else ("--compilation-cache", cache)
    return [sys.executable, "-m", "moe_jax", *map(str, (name, *arguments, *cached))]


def run(*arguments, cache="off", **options):
    return subprocess.run(command(*arguments, cache=cache), capture_output=True, text=True, timeout=120, **options)


def test_generate_prints_what_generate_returns(directory, model):
    done = run(
        "generate", "--model", directory, "--prompt", "To be", "-n", 12, "--temperature", 0, "--dtype", "float32"
    )
    want = moe_jax.generate(model, "To be", max_new_tokens=12).texts[0]
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"To be{want}\n"
    assert "experts that answered: layer 0: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "moe-jax: expected a prompt of at least one character"),
        (["--temperature", "-1"], "moe-jax: Sampling: expected temperature"),
        (["-n", "0"], "moe-jax: expected max_new_tokens to be a whole number of at least 1, got 0"),
        (["--model", "/nowhere/at/all"], "moe-jax: expected"),
    ],
)
def test_an_error_is_one_line(directory, arguments, message):
    done = run("generate", "--model", directory, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr


def test_chat_asks_for_a_chat_checkpoint(directory):
    done = run("chat", "--model", directory, input="")
    assert done.returncode == 2
    assert "expected a checkpoint with a chat template" in done.stderr
    assert not done.stdout, "said before anything is asked"


def test_chat_follows_the_template(directory, tmp_path):
    copy = tmp_path / "chat"
    shutil.copytree(directory, copy)
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    done = run("chat", "--model", copy, "-n", 8, "--temperature", 0, "--dtype", "float32", input="hi\nagain\n\n")
    assert done.returncode == 0, done.stderr
    chat = moe_jax.load(copy, dtype="float32")
    first = moe_jax.generate(chat, "[user]hi[assistant]", max_new_tokens=8).texts[0]
    second = moe_jax.generate(chat, f"[user]hi[assistant]{first}[user]again[assistant]", max_new_tokens=8).texts[0]
    assert done.stdout == f"> {first}\n> {second}\n> "


def test_control_c_ends_cleanly(directory, tmp_path, heeds_control_c):
    copy = tmp_path / "long"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=100_000, eos_token_id=None)))
    arguments = command("generate", "--model", copy, "--prompt", "a", "-n", 50_000)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert len(process.stdout.read(30)) == 30  # it is under way
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopped" in stderr
    assert b"Traceback" not in stderr


def test_a_reader_that_leaves_ends_it_without_a_word(directory):
    arguments = command("generate", "--model", directory, "--prompt", "a", "-n", 200, "--stop", "never")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 141
    assert b"BrokenPipe" not in stderr


def test_info_says_what_runs_here_and_why_not_the_rest():
    done = run("info", env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    for model_type in moe_jax.models.FAMILIES:
        assert model_type in done.stdout
    assert "Kernels on cpu" in done.stdout
    assert "reference" in done.stdout
    assert all(op in done.stdout for op in ("route", "experts", "matvec", "decode_attention"))


def test_compiled_programs_are_kept(directory, tmp_path):
    cache = tmp_path / "compiled"
    done = run("generate", "--model", directory, "-n", 2, "--prompt", "a", cache=cache)
    assert done.returncode == 0, done.stderr
    kept = {path.name for path in cache.iterdir() if path.name.endswith("-cache")}
    assert any("prefill" in name for name in kept)
    run("generate", "--model", directory, "-n", 2, "--prompt", "a", cache=cache)
    assert {path.name for path in cache.iterdir() if path.name.endswith("-cache")} == kept


def test_a_cache_that_cannot_be_written_is_one_line(directory, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("generate", "--model", directory, "--prompt", "a", cache=tmp_path / "file" / "below")
    assert done.returncode == 2
    assert "moe-jax: expected --compilation-cache to be a directory that can be written" in done.stderr
