"""What one multiplication by a weight is, whatever its kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def directly(op: Any, x: Tensor) -> Callable[..., Any]:
    """An op's own function, checks included, where nobody is told of ops: torch's way to it takes longer than it does."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    own: Callable[..., Any] = op if watched or type(x) is not Tensor else getattr(op, "_init_fn", op)
    return own


class WeightKind(ABC):
    """How a weight ``[O, C]`` multiplies an input: what linear maps and convolutions do differently, and nothing else.

    Attributes:
        ADDS_INPUTS: whether :meth:`sum_weight` is there.
        KERNEL_PRODUCTS: whether :meth:`kernel_products` is there.
    """

    ADDS_INPUTS = False
    KERNEL_PRODUCTS = False

    @property
    def groups(self) -> int:
        """Equal blocks of output rows, each of which multiplies inputs of its own."""
        return 1

    @abstractmethod
    def input_rows(self, x: Tensor) -> int | tuple[int, ...]:
        """Activation rows that a row of the weight multiplied; one number for each group where they differ."""

    @abstractmethod
    def add_column_norms_(self, x: Tensor, norm: Tensor, ord: float) -> None:
        """Add the column norms of an input to ``norm``, float64 ``[groups, C]``."""

    @abstractmethod
    def channel_dim(self, x: Tensor) -> int | None:
        """The dimension of the input in which it has one place for every channel of the weight; ``None`` where rows of the
        weight differ in what they see of it, so that only the whole input will do."""

    @abstractmethod
    def sampled_gradient(self, gy: Tensor, x: Tensor, row_offsets: Tensor, columns: Tensor) -> Tensor:
        """The gradient of the chosen entries.

        Args:
            gy: the gradient of the output.
            x: the input, or those of its channels that ``columns`` are counted among.
            row_offsets: int32 ``[O + 1]``.
            columns: int32 ``[nnz]``.

        Returns:
            float32 ``[nnz]``, in CSR order.
        """

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The output without a bias, in operations that can be differentiated.

        Args:
            x: the input, or some of its channels.
            weight: as the call was given it, or those of its channels.
        """

    @abstractmethod
    def input_gradient(self, gy: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input of that ``shape``, from what it was multiplied by."""

    def row_products(self, gy: Tensor, y: Tensor) -> Tensor:
        """For every output neuron, the sum over all samples of ``gy * y``, float32 ``[O]``.

        Args:
            gy: of the output's shape.
            y: likewise, or with one neuron for each group, which is multiplied with all of the group's.
        """
        return (gy.float() * y.float()).flatten(0, -2).sum(0)

    def kernel_products(self, gy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """For every position of the kernel, the sum over all samples and neurons of ``gy`` times what it adds to the output,
        float32; of signals only."""
        raise TypeError("only convolutions of signals are normalised by the positions of their kernel")

    def sum_weight(self, weight: Tensor) -> Tensor:
        """A weight of ones, whose neurons add up the inputs that those of each group of ``weight`` multiply."""
        return torch.ones((self.groups, *weight.shape[1:]), dtype=weight.dtype, device=weight.device)

    def bias_gradient(self, gy: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of what was added to the output, of that ``shape``."""
        return gy.sum_to_size(shape)


class Call(NamedTuple):
    """A call of a function, read as the multiplication of an input by a weight.

    Attributes:
        weight: the argument that takes the place of the weight.
        input: what it multiplies.
        others: further arguments that may be tensors, such as the bias.
        kind: how it multiplies.
        row_dims: the dimensions of the argument that count output neurons, ascending; the others count what they multiply.
    """

    weight: Any
    input: Any
    others: tuple[Any, ...]
    kind: WeightKind
    row_dims: tuple[int, ...] = (0,)
