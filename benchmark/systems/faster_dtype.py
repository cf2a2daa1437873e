"""
Prints bf16 or fp32, whichever is faster here. A CPU without bf16 instructions is many times slower in bf16 than in
fp32; the probe is a product of matrices, repeated for a fifth of a second.
"""

import torch
from torch.utils.benchmark import Timer

device = "cuda" if torch.cuda.is_available() else "cpu"
seconds = {}
for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
    size = 256 if device == "cpu" else 4096  # on a GPU, a small one takes as long as its launch
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds[name] = Timer("m @ m", globals={"m": matrix}).blocked_autorange(min_run_time=0.2).median
print(min(seconds, key=seconds.get))
