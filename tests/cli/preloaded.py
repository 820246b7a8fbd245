"""What the process has imported from which the runs of the command line are forked."""

import torch
import torch._dynamo

import fps_kernels.cli.choice
import fps_kernels.cli.select
import fps_kernels.cli.training
import fps_kernels.cli.tune
import fps_kernels.cli.tuning  # noqa: F401

torch.set_num_threads(1)  # threads that wait for each other make small operations slow where cores are shared
