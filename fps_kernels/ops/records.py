"""Arguments that belong together, as one record for every backend. ``torch.library`` takes them one by one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

from torch import Tensor

Gradients: TypeAlias = Sequence[Tensor] | Sequence[int]  # tensors, or their addresses


class Convolution(NamedTuple):
    """The geometry of a 2-D convolution; index 0 is vertical, 1 horizontal.

    Attributes:
        kernel_size: ``(kh, kw)``.
        stride: steps between output positions.
        padding: zeros around the image, ``(top, bottom, left, right)``.
        dilation: steps between the entries of the kernel.
        groups: number of groups of channels.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output for images ``[B, C_in, H, W]``; not positive where the kernel does not fit in."""
        top, bottom, left, right = self.padding
        height, width = (
            (size + pad - spread * (kernel - 1) - 1) // step + 1
            for size, pad, kernel, step, spread in zip(
                x.shape[2:], (top + bottom, left + right), self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        return height, width


GELU, GELU_TANH, LAYER_NORM = 1, 2, 3  # `Operation` in csrc/kernels.h


class Recomputed(NamedTuple):
    """How the input of a linear map is made of the numbers that an operation keeps of its own input.

    Attributes:
        operation: ``GELU``, ``GELU_TANH`` or ``LAYER_NORM`` over the last dimension.
        mean: of each row, float32 ``[..., 1]``, of a LayerNorm.
        scale: of each row, float32 ``[..., 1]``, of a LayerNorm.
        weight: of a LayerNorm, ``[C]``, or ``None``.
        bias: of a LayerNorm, ``[C]``, or ``None``.
    """

    operation: int
    mean: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Csr:
    """Chosen entries whose addresses and sizes are asked once, for calls in which asking would cost more than computing.

    Attributes:
        row_offsets: int32 ``[O + 1]``.
        columns: int32 ``[nnz]``.
        nnz: number of entries.
        addresses: of both, 0 where a tensor has no memory.
    """

    __slots__ = ("addresses", "columns", "nnz", "row_offsets")

    def __init__(self, row_offsets: Tensor, columns: Tensor) -> None:
        self.row_offsets, self.columns, self.nnz = row_offsets, columns, columns.shape[0]
        there = type(columns) is Tensor and not columns.is_meta
        self.addresses = (row_offsets.data_ptr(), columns.data_ptr()) if there else (0, 0)


class AdamWTensors(NamedTuple):
    """The tensors of :func:`fps_kernels.ops.masked_adamw_`, which says what they are."""

    weights: list[Tensor]
    grads: list[Tensor]
    row_offsets: list[Tensor]
    columns: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    agreed: list[Tensor]  # where values are noted as well, for agree_values_; empty where they are not


class AdamWOptions(NamedTuple):
    """The numbers of :func:`fps_kernels.ops.masked_adamw_`, which says what they are.

    Of a prepared step the learning rates may be plain numbers: on a GPU they are copied there where they changed.
    """

    lrs: Tensor | Sequence[float]
    weight_decays: Sequence[float]
    beta1: float
    beta2: float
    eps: float
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    zero_grads: bool


class Agreement(NamedTuple):
    """The arguments of :func:`fps_kernels.ops.agree_values_`, which says what they are."""

    weights: list[Tensor]
    row_offsets: list[Tensor]
    columns: list[Tensor]
    values: list[Tensor]
    agreed: list[Tensor]


class PreparedAgreement(ABC):
    """:func:`fps_kernels.ops.agree_values_` with arguments that stay: see :func:`fps_kernels.ops.prepared_agreement`."""

    @abstractmethod
    def run(self) -> None:
        """The op on all tensors."""

    @abstractmethod
    def run_one(self, index: int) -> None:
        """The op on the tensors at one place of the lists."""


class PreparedAdamW(ABC):
    """:func:`fps_kernels.ops.masked_adamw_` with tensors that stay: see :func:`fps_kernels.ops.prepared_adamw`."""

    def __init__(self, tensors: AdamWTensors) -> None:
        self._held = tensors._replace(grads=[])  # gradients come and go, and may be large
        self._layouts = [(g.dtype, g.shape, g.stride()) for g in tensors.grads]
        self._addresses = [g.data_ptr() for g in tensors.grads]

    @abstractmethod
    def run(self, grads: Gradients, options: AdamWOptions) -> None:
        """One step. What it is given is trusted.

        Args:
            grads: tensors like those this was prepared with, or their addresses (not on the reference backend).
            options: the numbers of this step.

        Raises:
            ValueError: a gradient at a new address has another dtype, shape or strides than the one in its place before.
        """

    def _moved(self, grads: Gradients) -> list[int] | None:
        """The addresses of the gradients, where they are not those of the last run."""
        if isinstance(grads[0], int):
            return None if grads == self._addresses else [int(address) for address in grads]
        tensors = cast(Sequence[Tensor], grads)
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses == self._addresses:
            return None
        layouts = [(grad.dtype, grad.shape, grad.stride()) for grad in tensors]
        if layouts != self._layouts:
            i = next(i for i, (found, wanted) in enumerate(zip(layouts, self._layouts, strict=True)) if found != wanted)
            found, (dtype, shape, strides) = tensors[i], self._layouts[i]
            raise ValueError(
                f"grads[{i}] must be {dtype} of shape {list(shape)} with strides {list(strides)}, as when the step was "
                f"prepared, got {found.dtype}, {list(found.shape)}, {list(found.stride())}"
            )
        return addresses
