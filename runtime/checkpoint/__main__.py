"""The commands `ringfold checkpoint ls | verify | export`, which need torch and so run as a module of their own."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from ringfold.collectives.errors import RingfoldError
from ringfold.runtime.checkpoint.export import export as export_model
from ringfold.runtime.checkpoint.listing import list_checkpoints, size_text, table_of
from ringfold.runtime.checkpoint.reader import load
from ringfold.runtime.checkpoint.verification import damages, subjects

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_Folder = click.Path(path_type=Path)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RingfoldError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """List, verify and export checkpoints."""


@main.command()
@click.argument("directory", metavar="DIR", type=_Folder)
def ls(directory: Path) -> None:
    """List the checkpoints in DIR, oldest first: step, time, size, ranks, and whether each is complete."""
    found = list_checkpoints(directory)
    if not found:
        click.echo(f"no checkpoints in {directory}")
        return
    # Whoever reads it from a pipe wants whole lines.
    Console(width=None if sys.stdout.isatty() else 400).print(table_of(found, datetime.now(UTC)))


@main.command()
@click.argument("directory", metavar="DIR", type=_Folder)
def verify(directory: Path) -> None:
    """Read every tensor of a checkpoint, or of all in DIR, and compare its sha256. Exit code 1 if one differs, with file and tensor."""
    found_damage = False
    for path in subjects(directory):
        problems, right, nbytes = damages(path)
        found_damage = found_damage or bool(problems)
        click.echo(f"{path}: {'DAMAGED' if problems else 'right'}; {right} parts, {size_text(nbytes)} have their sha256")
        for problem in problems:
            click.echo(f"  {problem}")
    sys.exit(1 if found_damage else 0)


@main.command()
@click.argument("directory", metavar="DIR", type=_Folder)
@click.option("--to", "target", metavar="FILE", type=_Folder, required=True, help="The safetensors file to write; it must not exist.")
@click.option("--dtype", type=click.Choice(_DTYPES), default=None, help="Convert floating-point tensors.  [default: as saved]")
def export(directory: Path, target: Path, dtype: str | None) -> None:
    """Write the model of a checkpoint, or of the newest in DIR, to one file that PyTorch and Hugging Face read.

    Tied tensors are stored once, under their first name; the file's metadata tells the others.
    """
    checkpoint = load(directory)
    tensors, nbytes, left_out = export_model(checkpoint.path, target, None if dtype is None else getattr(torch, dtype))
    click.echo(f"{target}: {tensors} tensors, {size_text(nbytes)}, from {checkpoint.path}")
    if left_out:
        click.echo(f"left out, as they are no tensors: {', '.join(left_out)}")


if __name__ == "__main__":
    main(prog_name="ringfold checkpoint")
