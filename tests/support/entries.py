"""Selected entries of weights in all layouts, and what an optimizer has of them."""

import torch
from torch import Tensor

from fps_kernels import ops
from fps_kernels.ops import reference

INT = torch.int32


def random_csr(rows: int, columns: int, device: torch.device, density: float = 0.2) -> tuple[Tensor, Tensor]:
    mask = torch.rand(rows, columns, device=device) < density
    if rows > 1:
        mask[1] = False  # a row without entries
    row_offsets = torch.cat([torch.zeros(1, dtype=INT, device=device), mask.sum(1).cumsum(0).to(INT)])
    return row_offsets, mask.nonzero()[:, 1].to(INT)


def layouts(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "contiguous": torch.randn(13, 37, device=device).to(dtype),
        "transposed": torch.randn(37, 13, device=device).to(dtype).t(),
        "sliced": torch.randn(26, 80, device=device).to(dtype)[::2, 3:77:2],
        "single": torch.randn(1, 1, device=device).to(dtype),
        "no columns": torch.randn(3, 0, device=device).to(dtype),
    }


LAYOUTS = list(layouts(torch.device("cpu"), torch.float32))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


class AdamWProblem:
    """Several weights with their selections, gradients and state, and the same entries as dense torch parameters."""

    def __init__(self, device, weight_dtype, grad_dtype=None, compact=False, names=LAYOUTS):
        shapes = layouts(device, weight_dtype)
        self.weights = [shapes[name] for name in names]
        self.csr = [random_csr(*W.shape, device) for W in self.weights]
        self.rows = [reference.entry_rows(offsets) for offsets, _ in self.csr]
        self.masters = [
            W[rows, c.long()].float() if weight_dtype != torch.float32 else torch.empty(0, device=device)
            for W, rows, (_, c) in zip(self.weights, self.rows, self.csr, strict=True)
        ]
        self.device, self.compact, self.grad_dtype = device, compact, grad_dtype or weight_dtype
        self.exp_avgs = [torch.zeros(c.numel(), device=device) for _, c in self.csr]
        self.exp_avg_sqs = [torch.zeros(c.numel(), device=device) for _, c in self.csr]
        self.steps = [torch.zeros((), device=device) for _ in self.csr]
        self.before = [W.clone() for W in self.weights]

    def values(self, i: int) -> Tensor:
        if self.masters[i].numel():
            return self.masters[i]
        return self.weights[i][self.rows[i], self.csr[i][1].long()]

    def gradients(self) -> list[Tensor]:
        if self.compact:
            return [torch.randn(c.numel(), device=self.device).to(self.grad_dtype) for _, c in self.csr]
        return [torch.randn_like(W.float()).to(self.grad_dtype) for W in self.weights]

    def at_entries(self, grads: list[Tensor]) -> list[Tensor]:
        if self.compact:
            return grads
        return [g[rows, c.long()] for g, rows, (_, c) in zip(grads, self.rows, self.csr, strict=True)]

    def step(
        self, grads, lrs, weight_decays, betas=(0.9, 0.999), eps=1e-8, maximize=False, scale=None, found_inf=None, zero=False
    ):
        ops.masked_adamw_(
            self.weights,
            grads,
            [offsets for offsets, _ in self.csr],
            [columns for _, columns in self.csr],
            self.masters,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            torch.tensor(lrs, dtype=torch.float64, device=self.device),
            weight_decays,
            *betas,
            eps,
            maximize,
            scale,
            found_inf,
            zero,
        )


SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-40, 1e38, 65519.9, 65520.0, 1 + 2.0**-8)


class AgreementProblem:
    """Weights in all layouts whose values agree with them: rounded, where the weights are of 16 bits."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        shapes = layouts(device, dtype)
        self.weights = [shapes[name] for name in LAYOUTS]
        self.csr = [random_csr(*W.shape, device) for W in self.weights]
        self.places = [(reference.entry_rows(offsets), columns.long()) for offsets, columns in self.csr]
        self.values = []
        for W, place in zip(self.weights, self.places, strict=True):
            values = W[place].float()
            values *= 1 + 2.0**-12 * torch.rand_like(values)  # what 16 bits cannot hold
            W[place] = values.to(dtype)
            self.values.append(values)
        self.agreed = [values.clone() for values in self.values]

    @property
    def arguments(self) -> tuple[list[Tensor], ...]:
        return self.weights, [o for o, _ in self.csr], [c for _, c in self.csr], self.values, self.agreed

    def change(self, changed: list[Tensor], numbers: Tensor) -> None:
        """Some of the entries, ``changed``, each to one of the numbers."""
        for values, which in zip(changed, self._some(), strict=True):
            values[which] = numbers[torch.randint(len(numbers), (int(which.sum()),), device=values.device)].to(values.dtype)

    def change_weights(self, numbers: Tensor) -> None:
        held = [W[place] for W, place in zip(self.weights, self.places, strict=True)]
        self.change(held, numbers)
        for W, place, new in zip(self.weights, self.places, held, strict=True):
            W[place] = new

    def _some(self) -> list[Tensor]:
        return [torch.rand_like(values) < 0.4 for values in self.values]

    def snapshot(self) -> list[Tensor]:
        """All memory there is, that between the entries of a strided weight included."""
        memory = [torch.empty(0, dtype=W.dtype, device=W.device).set_(W.untyped_storage()) for W in self.weights]
        return [bits(t).clone() for t in (*memory, *self.values, *self.agreed)]

    def expected(self) -> list[list[tuple[float, float, float]]]:
        """Of each entry the value, what is agreed on, and the weight afterwards: entry by entry."""
        result = []
        for W, place, values, agreed in zip(self.weights, self.places, self.values, self.agreed, strict=True):
            entries = []
            for held, value, last in zip(W[place].cpu(), values.cpu(), agreed.cpu(), strict=True):
                if not torch.equal(bits(value[None]), bits(last[None])):
                    entries.append((value.item(), value.item(), value.to(W.dtype).item()))
                elif not torch.equal(bits(held[None]), bits(last.to(W.dtype)[None])):
                    entries.append((held.float().item(), held.float().item(), held.item()))
                else:
                    entries.append((value.item(), last.item(), held.item()))
            result.append(entries)
        return result
