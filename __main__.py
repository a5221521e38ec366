"""The command line: `plait`, or `python -m plait`."""

from __future__ import annotations

import sys
from typing import Annotated

import plait
import typer
from plait import (
    cli_calibrate,
    cli_compile,
    cli_describe,
    cli_docs,
    cli_explain,
    cli_generate,
    cli_kernels,
    cli_opt,
    cli_trace,
    cli_train,
    cli_tune,
)

app = typer.Typer(
    name="plait",
    help="Compile hybrid language models: from a spec to typed IR, fused programs, training and text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
for part in (
    cli_compile,
    cli_kernels,
    cli_opt,
    cli_explain,
    cli_trace,
    cli_train,
    cli_generate,
    cli_tune,
    cli_calibrate,
    cli_describe,
    cli_docs,
):
    part.mount(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"plait {plait.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """What stands before any command."""


def main() -> None:
    """Run the command line; text no terminal can show is escaped, not a failure."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")
    app(prog_name="plait")


if __name__ == "__main__":
    main()
