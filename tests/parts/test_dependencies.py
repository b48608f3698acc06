"""The direction of dependency: scripts and tests on moe_jax, that on sharding and pallas_kernels, they on jax alone."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
STANDARD = set(sys.stdlib_module_names)
ON_ARRAYS = STANDARD | {"jax", "jaxlib", "numpy", "jaxtyping", "ml_dtypes"}
# Inside moe_jax, a part may import itself and what stands to the right of it.
LAYERS = ("server", "engine", "generate", "models", "layers")


def _imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, with its names: `from jax import lax` gives `jax` and `jax.lax`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports, got a relative one on line {node.lineno}"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ["pallas_kernels", "sharding"])
def test_lower_packages_need_only_jax(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        foreign = {name for name in _imports(path) if name.split(".")[0] not in ON_ARRAYS | {package}}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}; {package} needs only jax and numpy"


def test_moe_jax_imports_downwards() -> None:
    for level, part in enumerate(LAYERS):
        above = {f"moe_jax.{name}" for name in LAYERS[:level]}
        files = [ROOT / "moe_jax" / f"{part}.py", *(ROOT / "moe_jax" / part).rglob("*.py")]
        for path in filter(pathlib.Path.exists, files):
            upwards = {name for name in _imports(path) if ".".join(name.split(".")[:2]) in above}
            assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}, which stand above {part}"


def test_forbidden_modules() -> None:
    # `from jax import sharding` would read as our package of that name; Pallas' Triton backend is deprecated.
    forbidden = {"jax.experimental.pallas.triton", "torch", "tensorflow"}
    for package in ("moe_jax", "pallas_kernels", "sharding"):
        for path in (ROOT / package).rglob("*.py"):
            used = forbidden & _imports(path)
            assert not used, f"{path.relative_to(ROOT)} imports {sorted(used)}"
            assert "from jax import sharding" not in path.read_text(), (
                f"{path.relative_to(ROOT)}: from jax.sharding import ..."
            )
