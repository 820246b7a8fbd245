"""What to install where a package is missing; needs none itself."""


def distribution_of(module: str | None) -> str:
    """What brings a module that is missing."""
    package = str(module).partition(".")[0]
    return {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}.get(package, package)


def install_hint(what: str, error: ImportError) -> str:
    """``what`` needs a package, and how it is installed."""
    package = str(error.name).partition(".")[0]
    return f"{what} needs {package}: pip install {distribution_of(package)}"
