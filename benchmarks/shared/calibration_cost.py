"""What calibration costs beside the forward pass where a model is so small that Python's work is all there is to see."""

import statistics

import torch

import fps_kernels as fps
from benchmarks.shared.measuring import alternate, ratio
from benchmarks.shared.models import tiny

BATCHES = 10


def calibration_cost(rounds: int = 15) -> dict[str, float]:
    """The host cost of ``fps.calibrate`` on a ViT with layers 48 wide, one thread, one image a batch.

    Args:
        rounds: in each of them a forward pass, a calibration with one batch and one with eleven take turns.

    Returns:
        Medians over the rounds: ``forward_ms``; ``batch_ms``, what a further batch takes, and ``batch_ratio``, that over the
        forward pass in the same round; ``constant_ms``, what a calibration takes whatever the number of batches.

    Example:
        >>> calibration_cost()["batch_ratio"]
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = tiny().eval()
        x = torch.randn(1, 3, 32, 32)

        def forward() -> None:
            with torch.no_grad():
                for _ in range(BATCHES):
                    model(x)

        contestants = {
            "forward": forward,
            "one": lambda: fps.calibrate(model, [x], progress=False),
            "many": lambda: fps.calibrate(model, [x] * (1 + BATCHES), progress=False),
        }
        times = alternate(contestants, rounds, before=1)
    finally:
        torch.set_num_threads(threads)
    times["further"] = [many - one for many, one in zip(times["many"], times["one"], strict=True)]
    constant = [one - further / BATCHES for one, further in zip(times["one"], times["further"], strict=True)]
    return {
        "forward_ms": statistics.median(times["forward"]) / BATCHES,
        "batch_ms": statistics.median(times["further"]) / BATCHES,
        "batch_ratio": ratio(times, "further", "forward"),
        "constant_ms": statistics.median(constant),
    }


if __name__ == "__main__":
    for name, value in calibration_cost().items():
        print(f"{name:12s} {value:.2f}")
