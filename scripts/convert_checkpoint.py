"""Converts a checkpoint between Hugging Face's format and Orbax, bit by bit.

    python scripts/convert_checkpoint.py Qwen/Qwen3-30B-A3B build/qwen3-orbax
    python scripts/convert_checkpoint.py build/qwen3-orbax build/qwen3-hf

What it reads decides what it writes. Parameters keep their dtype unless --dtype asks for another; --mesh spreads them over
the devices meanwhile, where one cannot hold them all. A conversion that is killed leaves what was there before.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys

import moe_jax
from moe_jax.checkpoints import hub, orbax
from moe_jax.checkpoints.safetensors import read_contents
from moe_jax.model import BUNDLED, DTYPES

BESIDE = ("generation_config.json",)  # kept where the source has them; the tokenizer's files go with the model


def stored_dtype(directory: pathlib.Path) -> str:
    """The one dtype that all of a checkpoint's tensors have.

    Raises:
      ValueError: there are several, so that no single one keeps every bit.
    """
    if orbax.is_orbax(directory):
        found = orbax.read_orbax_dtypes(directory)
    else:
        found = {str(tensor.dtype) for tensor in read_contents(directory).tensors.values()}
    if len(found) != 1 or not found <= set(DTYPES):
        raise ValueError(
            f"expected all tensors of {directory} to be of one dtype out of {', '.join(DTYPES)}, got "
            f"{', '.join(sorted(found))}: choose one with --dtype, others are cast"
        )
    return found.pop()


def convert(
    source: str, target: pathlib.Path, *, dtype: str | None = None, mesh: str | None = None, overwrite: bool = False
) -> str:
    """Writes `target` in the format that `source` does not have, and says what it did.

    Raises:
      ValueError: the source is no checkpoint, its tensors differ in dtype, or the target is there already.
    """
    directory = pathlib.Path(source)
    if not orbax.is_orbax(directory):
        directory = BUNDLED.get(source) or hub.resolve(source)
    if target.absolute() == directory.absolute():
        raise ValueError(f"expected a target that is not the source, got {target} twice")
    dtype = dtype or stored_dtype(directory)
    is_orbax = orbax.is_orbax(directory)
    load, save = (moe_jax.load_orbax, moe_jax.save) if is_orbax else (moe_jax.load, moe_jax.save_orbax)
    model = load(directory, dtype=dtype, mesh=mesh)
    save(model, target, overwrite=overwrite)
    for name in BESIDE:
        if (directory / name).exists():
            shutil.copyfile(directory / name, target / name)
    formats = ("Orbax", "Hugging Face") if is_orbax else ("Hugging Face", "Orbax")
    return f"{source} ({formats[0]}) -> {target} ({formats[1]}): {model.num_parameters:,} parameters in {dtype}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a directory of either format, a hub id, or a bundled model")
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--mesh", help='devices to spread the parameters over, such as "ep=4"')
    parser.add_argument("--overwrite", action="store_true", help="replace what the target holds, all of it")
    flags = parser.parse_args()
    try:
        print(convert(flags.source, flags.target, dtype=flags.dtype, mesh=flags.mesh, overwrite=flags.overwrite))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
