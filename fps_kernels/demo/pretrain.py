"""Makes the checkpoint that ships with the package: a small ViT pretrained on the digits 0–4.

Run ``python -m fps_kernels.demo.pretrain``; it takes one to two minutes on two cores.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fps_kernels.demo.compare import accuracy
from fps_kernels.demo.data import OLD_DIGITS, digits
from fps_kernels.demo.digits import DIGITS_CHECKPOINT, digits_vit


def main(epochs: int = 150) -> None:
    """Train, print the accuracy on held-out old digits, write float16 weights without the head."""
    torch.manual_seed(0)
    task = digits(OLD_DIGITS, train_per_class=140)
    model = digits_vit(task.classes, pretrained=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(task.train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        model.train()
        for images, target in task.batches(task.train, 64, generator):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            optimizer.zero_grad()
            F.cross_entropy(model(images.roll(shift, (2, 3))), target, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    state = {name: value.half() for name, value in model.state_dict().items() if not name.startswith("head.")}
    save_file(state, DIGITS_CHECKPOINT)
    print(f"{accuracy(model, task):.1%} of held-out old digits; {DIGITS_CHECKPOINT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
