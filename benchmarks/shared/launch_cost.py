"""What the way to a GPU costs the host, timed without one: ``python -m benchmarks.shared.launch_cost``.

Launches end in a driver that does nothing, so that what is timed is Python: finding out what to launch, and handing it over.
What the driver of a real GPU takes on top (2 to 4 µs a launch) is no part of it, nor are the checks of the registered ops.
"""

import copy
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

import fps_kernels as fps
from fps_kernels.ops import _dispatch
from fps_kernels.ops import triton as backend
from fps_kernels.ops.records import AdamWOptions, AdamWTensors, Agreement, Convolution
from fps_kernels.ops.triton.gradients import sampled_grad_with_bias
from fps_kernels.ops.triton.launching import forget_plans
from kernel_lab.fake_gpu import fake_gpu

TENSORS = 50  # of an optimizer, as a ViT with 12 blocks has them


def launch_cost(calls: int = 2000, rounds: int = 7) -> dict[str, float]:
    """Microseconds of Python a call, beyond what PyTorch takes to allocate the result; the best of some rounds."""
    with fake_gpu() as driver:
        driver.listening = False
        return _timed(calls, rounds)


def _timed(calls: int, rounds: int) -> dict[str, float]:
    gy, x = torch.randn(32, 3072), torch.randn(32, 160)
    csr = torch.arange(3073, dtype=torch.int32), torch.randint(0, 160, (3072,), dtype=torch.int32)
    tall = torch.randn(4096, 3072), torch.randn(4096, 160)
    image, positions = torch.randn(1, 3, 32, 32), torch.randn(1, 768, 2, 2)
    patches = Convolution((16, 16), (16, 16), (0, 0, 0, 0), (1, 1), 1)
    windows = torch.arange(769, dtype=torch.int32), torch.randint(0, 768, (768,), dtype=torch.int32)

    weights = [torch.zeros(64, 64) for _ in range(TENSORS)]
    offsets, columns = torch.arange(65, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    lists = [[offsets] * TENSORS, [columns] * TENSORS]
    state = [[torch.zeros(64) for _ in weights] for _ in range(5)]
    steps = [torch.zeros(()) for _ in weights]
    lrs, decays = [1e-3] * TENSORS, [0.0] * TENSORS
    options = AdamWOptions(lrs, decays, 0.9, 0.999, 1e-8, False, None, None, False)
    addresses = [grad.data_ptr() for grad in state[0]]
    moving = [[grad.clone() for grad in state[0]] for _ in range(2)]

    def microseconds(call: Callable[[], object]) -> float:
        return min(timeit.repeat(call, number=calls, repeat=rounds)) / calls * 1e6

    def bound_by_triton() -> None:
        forget_plans()
        backend.sampled_grad(gy, x, *csr)

    adamw = backend.PreparedAdamW(AdamWTensors(weights, state[0], *lists, *state[1:4], steps, state[4]))
    agreement = backend.PreparedAgreement(Agreement(weights, *lists, *state[3:5]))

    def step_with_moved_gradients() -> None:
        moving.reverse()
        adamw.run(moving[0], options)

    for call in (lambda: sampled_grad_with_bias(gy, x, *csr), agreement.run, lambda: adamw.run(state[0], options)):
        call()
    empty = microseconds(lambda: torch.empty(3072, dtype=torch.float32, device=gy.device))
    return {
        "torch.empty": empty,
        "sampled_grad": microseconds(lambda: backend.sampled_grad(gy, x, *csr)) - empty,
        "sampled_grad, every launch bound by Triton": microseconds(bound_by_triton) - empty,
        "sampled_grad with bias": microseconds(lambda: sampled_grad_with_bias(gy, x, *csr)) - empty,
        "sampled_grad, two launches": microseconds(lambda: backend.sampled_grad(*tall, *csr)) - 2 * empty,
        "sampled_grad_conv2d": microseconds(lambda: backend.sampled_grad_conv2d(positions, image, *windows, patches))
        - empty,
        f"step of {TENSORS} tensors": microseconds(lambda: adamw.run(state[0], options)),
        f"step of {TENSORS} tensors by their addresses": microseconds(lambda: adamw.run(addresses, options)),
        f"step of {TENSORS} tensors with moved gradients": microseconds(step_with_moved_gradients),
        f"agreement of {TENSORS} tensors": microseconds(agreement.run),
        "agreement of one of them": microseconds(lambda: agreement.run_one(7)),
    }


class Chain(nn.Module):
    """Linear layers one after the other, of which nothing is left but what they cost the host."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(48))
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first
        for layer in self.layers:
            x = layer(x)
        return x


def layer_cost(layers: int = TENSORS, rounds: int = 40) -> dict[str, float]:
    """Microseconds of Python an attached layer and pass, beyond one whose bias alone is trained.

    What PyTorch itself does for a bias is no part of it, the agreement of all weights is. The products of matrices are the
    CPU's, in both. The best of some rounds of each, as above.
    """
    plain = Chain(layers).requires_grad_(False)
    for name, p in plain.named_parameters():
        p.requires_grad_("weight" not in name)
    attached = copy.deepcopy(plain)
    masks = {f"layers.{i}.weight": torch.rand(48, 48) < 0.05 for i in range(layers)}
    biases = tuple(f"layers.{i}.bias" for i in range(layers))
    fps.attach(attached, fps.Selection(fps.Selection.from_masks(masks).weights, biases))
    attached.first.requires_grad_()
    x = torch.randn(2, 40, 48)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "attached": []}
    with fake_gpu() as driver, _served_by_triton():
        driver.listening = False
        for turn in range(-3, rounds):
            for name, model in (("plain", plain), ("attached", attached))[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                y = model(x)
                middle = time.perf_counter()
                y.sum().backward()
                end = time.perf_counter()
                model.zero_grad()
                if turn >= 0:
                    times[name].append((middle - start, end - middle))
    forward, backward = (
        (min(t[i] for t in times["attached"]) - min(t[i] for t in times["plain"])) / layers * 1e6 for i in range(2)
    )
    return {"forward": forward, "backward": backward}


@contextmanager
def _served_by_triton() -> Iterator[None]:
    """Tensors on the CPU take the way of those on a GPU, whose driver does nothing."""
    with (
        mock.patch.dict(_dispatch._modules, clear=True),
        mock.patch.dict(_dispatch._found, clear=True),
        mock.patch.object(_dispatch, "_backend_for", return_value="triton"),
    ):
        yield


if __name__ == "__main__":
    for name, cost in layer_cost().items():
        print(f"{f'a layer, {name}':50} {cost:6.1f} µs")
    for name, cost in launch_cost().items():
        print(f"{name:50} {cost:6.1f} µs")
