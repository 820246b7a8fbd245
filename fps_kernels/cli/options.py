"""Options that several commands share, and what they mean."""

from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance

    from fps_kernels.runs.splits import Source

Record = TypeVar("Record", bound="DataclassInstance")
MODEL, DATA, CHOICE, TRAINING, RUN = "Model", "Data", "Choice", "Training", "Run"
AUGMENTATION, MEMORY = "What is done to images at random", "Memory"


class Precision(StrEnum):
    """Dtypes of weights."""

    fp32 = "fp32"
    bf16 = "bf16"

    @classmethod
    def _missing_(cls, value: object) -> "Precision | None":
        """torch's own names, where a command takes any text."""
        return {"float32": cls.fp32, "bfloat16": cls.bf16}.get(str(value))

    @property
    def dtype(self) -> "torch.dtype":
        """torch's name of it."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.value]


class ScorerName(StrEnum):
    """What makes an entry worth tuning."""

    fps = "fps"
    wanda = "wanda"
    magnitude = "magnitude"
    random = "random"
    growth = "growth"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolve(self) -> "torch.device":
        """The device itself.

        Raises:
            ValueError: there is no such device here.
        """
        import torch

        if self is Device.auto:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self is Device.cuda and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")
        return torch.device(self.value)


def record(kind: type[Record], given: Mapping[str, Any], **made: Any) -> Record:
    """A dataclass of the options of a command, which has them under the same names.

    Args:
        kind: the dataclass.
        given: the command's arguments by name, others among them.
        made: fields that are not what was given.
    """
    names = [field.name for field in fields(kind)]
    return kind(**{name: made[name] if name in made else given[name] for name in names})


def source(given: Mapping[str, Any]) -> "Source":
    """Where images are, of the options of a command; one that is not the command's is not given."""
    from fps_kernels.runs.lists import Columns
    from fps_kernels.runs.splits import Source

    return Source(
        given["data"],
        given["data_root"],
        given["download"],
        given.get("train_split"),
        given.get("val_split"),
        given.get("test_split"),
        Columns(given["path_column"], given["label_column"]),
    )


Model = Annotated[str, typer.Argument(help="A timm architecture, such as vit_base_patch16_224.", metavar="MODEL")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Its weights with timm's keys: a .safetensors or .pth file.", rich_help_panel=MODEL)
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="timm's own weights, from its cache or downloaded.", rich_help_panel=MODEL)
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="Leave weights in the checkpoint, and read each when its module runs.", rich_help_panel=MODEL
    ),
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the images; the model's own if not given.", rich_help_panel=MODEL)
]
DType = Annotated[Precision, typer.Option(help="Of the weights.", rich_help_panel=MODEL)]
OnDevice = Annotated[Device, typer.Option(help="auto: a GPU if there is one.", rich_help_panel=MODEL)]

Data = Annotated[
    str,
    typer.Option(
        help="A folder with train/ and test/ (or val/), each with a folder per class or a metadata.csv; a list of paths and "
        "labels (.csv, .tsv, .jsonl); or a timm data set: torch/cifar10, hfds/NAME.",
        rich_help_panel=DATA,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Where a named data set lies, or what the paths of a list are relative to.", rich_help_panel=DATA),
]
PathColumn = Annotated[
    str | None, typer.Option(help="Column of paths in a list; file_name, path, image and so on.", rich_help_panel=DATA)
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of labels in a list; label, class, category and so on.", rich_help_panel=DATA)
]
ValidationSplit = Annotated[
    str | None, typer.Option("--val-split", help="val or validation, if there is one.", rich_help_panel=DATA)
]
TestSplit = Annotated[str | None, typer.Option(help="test, if there is one.", rich_help_panel=DATA)]
ValidationShare = Annotated[
    float | None,
    typer.Option("--val-share", help="Hold out such a share of the training images of each class.", rich_help_panel=DATA),
]
Download = Annotated[bool, typer.Option("--download", help="Download a named data set.", rich_help_panel=DATA)]
TrainSplit = Annotated[str | None, typer.Option(help="train if not given.", rich_help_panel=DATA)]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that read images; by the cores if not given.", rich_help_panel=DATA)
]
Seed = Annotated[int, typer.Option(min=0, help="Of the new head, of what is drawn and of the order.", rich_help_panel=DATA)]

Scorer = Annotated[ScorerName, typer.Option(help="What makes an entry worth tuning.", rich_help_panel=CHOICE)]
Anchor = Annotated[
    Path | None,
    typer.Option(help="For growth: a folder of images of the pretraining's kind.", rich_help_panel=CHOICE),
]
PerRow = Annotated[int | None, typer.Option("--k", min=1, help="Entries per output neuron [1].", rich_help_panel=CHOICE)]
Density = Annotated[
    float | None, typer.Option(help="Instead of --k: share of each weight's entries, in (0, 1].", rich_help_panel=CHOICE)
]
Global_ = Annotated[
    bool, typer.Option("--global", help="--density of all weights together, not of each.", rich_help_panel=CHOICE)
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Glob of weights to choose from; may be repeated.", metavar="GLOB", rich_help_panel=CHOICE),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Glob of weights to leave frozen; may be repeated.", metavar="GLOB", rich_help_panel=CHOICE),
]
Dense = Annotated[
    list[str] | None,
    typer.Option(
        help="Glob of parameters to train whole, instead of head and biases; may be repeated.",
        metavar="GLOB",
        rich_help_panel=CHOICE,
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, help="At most so many training images, drawn by the seed.", rich_help_panel=CHOICE)
]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Choose in pieces of so many images: less memory.", rich_help_panel=CHOICE),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
