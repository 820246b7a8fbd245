"""The checks, the most valuable first: a run that is cut short has told the most."""

from functools import partial

from benchmarks.gpu_check import bandwidth, choosing, graphs, host, suites, training
from benchmarks.gpu_check.agreement import agreement
from benchmarks.gpu_check.rows import Check

CHECKS: dict[str, Check] = {
    "ops against the reference": Check(agreement, 90),
    "waits": Check(host.waits, 60),
    "host": Check(host.host, 60),
    "bandwidth of the kernels": Check(bandwidth.bandwidth, 120),
    "training step, ViT-B": Check(partial(training.training, "vit_base_patch16_224"), 120),
    "choosing over a forward pass": Check(choosing.choosing, 90),
    "optimizer step": Check(graphs.optimizer, 60),
    "whole step in a graph": Check(graphs.whole_step, 60),
    "training step, ViT-L": Check(partial(training.training, "vit_large_patch16_224"), 120),
    "compiled step": Check(graphs.compiled, 120),
    "GPS over FPS": Check(choosing.gps_over_fps, 60),
    "op suite": Check(suites.op_suite, 360),
    "sanitizers": Check(suites.sanitizers, 180),
}
