"""One thread per process: on a few shared cores more of them only wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
