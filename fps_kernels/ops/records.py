"""Arguments that belong together, as one record for every backend. ``torch.library`` takes them one by one."""

from typing import NamedTuple

from torch import Tensor


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


class AdamWStep(NamedTuple):
    """The arguments of :func:`fps_kernels.ops.masked_adamw_`, which says what they are."""

    weights: list[Tensor]
    grads: list[Tensor]
    row_offsets: list[Tensor]
    columns: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    lrs: Tensor
    weight_decays: list[float]
    beta1: float
    beta2: float
    eps: float
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    zero_grads: bool
