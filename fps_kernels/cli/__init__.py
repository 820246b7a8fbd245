"""The command line ``fps-kernels``.

Exit codes: 0 success, 1 a check failed, 2 an error that the user can mend, told in one line on standard error, 130
interrupted (143 if by SIGTERM).
"""

import os
import sys
from typing import Annotated

from fps_kernels._version import __version__
from fps_kernels.runs.hints import install_hint


def main() -> None:
    """Entry point of ``fps-kernels``."""
    try:
        import typer

        from fps_kernels.cli.demo import demo
        from fps_kernels.cli.doctor import doctor
        from fps_kernels.cli.errors import run
        from fps_kernels.cli.inspect import apply, compare, inspect
        from fps_kernels.cli.plan import plan
        from fps_kernels.cli.select import select
        from fps_kernels.cli.tune import tune
        from fps_kernels.cli.use import evaluate, export, predict
    except ImportError as error:
        print(f"error: {install_hint('the command line', error)}", file=sys.stderr)
        sys.exit(2)

    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

    def version(wanted: bool) -> None:
        if wanted:
            typer.echo(__version__)
            raise typer.Exit

    @app.callback()
    def fps_kernels(
        version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print it.")] = False,
    ) -> None:
        """Choose the few weights worth tuning in one forward pass, and tune only those."""

    for command in (select, tune, evaluate, predict, export, apply, inspect, compare, plan, demo, doctor):
        app.command()(command)
    status = run(app)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has gone (| head): typer says 1 where it notices, and so do we
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
