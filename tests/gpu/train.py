"""scripts/train_zero.py, with ZeRO-3 sharding even small weights: DeepSpeed leaves all of the quickstart's whole."""

import runpy
import sys

from helpers import ROOT, shard_even_small_weights

shard_even_small_weights()
sys.argv[0] = str(ROOT / "scripts/train_zero.py")
runpy.run_path(sys.argv[0], run_name="__main__")
