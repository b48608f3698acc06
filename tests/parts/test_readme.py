"""README's code runs, and its tables are those of the code."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "['length', 'length']" in printed
    assert (tmp_path / "build" / "shakespeare" / "model.safetensors").exists()


def test_tables_are_up_to_date():
    script = runpy.run_path(str(ROOT / "scripts" / "make_tables.py"))
    for name, table in script["tables"]().items():
        assert script["with_table"](README, name, table) == README, "run python scripts/make_tables.py"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
