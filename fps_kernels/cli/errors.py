"""What becomes of errors: one line on standard error and an exit code."""

import sys
from typing import Any

import typer

from fps_kernels.runs.hints import install_hint
from fps_kernels.runs.progress import speaks
from fps_kernels.runs.stopping import InterruptedRunError

# typer carries a copy of click or uses the installed one, depending on its version: this class is the one it raises.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = _UsageError.__mro__[1]


def run(app: typer.Typer) -> int:
    """Run the command line and return its exit code; anything but a mistake in this package is told in one line."""
    try:
        code = app(standalone_mode=False, prog_name="fps-kernels")
        return code if isinstance(code, int) else 0
    except InterruptedRunError as error:
        return _tell(str(error), error.exit_code, "interrupted") if speaks() else error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _tell("", 130, "interrupted")
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        usage = f" ({context.command_path} --help)" if context is not None else ""
        text = error.format_message()
        return _tell(f"{text}{usage}", 2) if text else 2
    except Exception as error:
        if not _is_the_users(error):
            raise
        return _tell(_text(error) + _hint(error), 2)


def _is_the_users(error: Exception) -> bool:
    """Whether an error says something about the input rather than about a mistake in this package."""
    import torch
    from safetensors import SafetensorError

    return isinstance(error, ValueError | TypeError | ImportError | OSError | SafetensorError | torch.OutOfMemoryError)


def _text(error: Exception) -> str:
    missing = "No such file or directory: "  # what safetensors says, without the number of the error
    if isinstance(error, FileNotFoundError) and (error.filename is not None or str(error).startswith(missing)):
        return f"there is no file or folder {error.filename or str(error).removeprefix(missing)}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _hint(error: Exception) -> str:
    """What brings a package that is missing, where the message does not say it."""
    if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):
        return f"; {install_hint('the command', error)}"
    return ""


def _tell(text: str, code: int, label: str = "error") -> int:
    line = " ".join(text.split())
    print(f"{label}: {line}" if line else label, file=sys.stderr)
    return code
