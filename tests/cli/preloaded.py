"""What the process has imported from which the runs of the command line are forked."""

import torch
import torch._dynamo

torch.set_num_threads(1)  # threads that wait for each other make small operations slow where cores are shared
