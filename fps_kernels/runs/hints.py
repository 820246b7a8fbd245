"""What to install where a package is missing; needs none itself."""


def distribution_of(module: str | None) -> str:
    """What brings a module that is missing."""
    package = str(module).partition(".")[0]
    return {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}.get(package, package)


def install_hint(what: str, error: ImportError, *more: str) -> str:
    """``what`` needs a package, and how it is installed, together with ``more``."""
    package = str(error.name).partition(".")[0]
    wanted = dict.fromkeys((distribution_of(package), *more))
    return f"{what} needs {package}: pip install {' '.join(wanted)}"
