"""
How much of a GPU's arithmetic a training pass of PPO uses: FLOPs of one forward and backward pass of policy and value
model on one micro-batch, without the optimizer step, its seconds, and its share of the FLOP/s of a matrix product. In
bf16 on a GPU; in fp32 on a CPU, of which some compute bf16 hundreds of times slower.

    python benchmark/systems/training_pass.py --shape 1b --rows 8 16 32

The models have random weights. A row has 345 query tokens and 53 response tokens, about those of the real posts, and no
row is padded. FLOPs are counted by torch's FlopCounterMode, which counts attention as if it were not causal (4% of all
at 1b), and on a CPU not at all.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.systems.inputs import SHAPES  # noqa: E402
from ppo import PolicyAndValue, ScalarModel  # noqa: E402

PAD = 50277


@dataclass
class Args:
    shape: Literal[tuple(SHAPES)] = "14m"  # of the models
    rows: tuple[int, ...] = (2,)  # sizes of the micro-batch
    matrix: int = 8192  # rows and columns of the matrix product


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden, layers, heads = SHAPES[args.shape]
    sizes = dict(hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers)
    config = GPTNeoXConfig(**sizes, num_attention_heads=heads, vocab_size=50304, pad_token_id=PAD, num_labels=1)
    config.normalization_offset = 0.0
    with torch.device(device):
        value_model = ScalarModel(GPTNeoXForSequenceClassification(config))
        model = PolicyAndValue(GPTNeoXForCausalLM(config), value_model, PAD)

    def seconds(statement, **names):
        return Timer(statement, globals=names).blocked_autorange(min_run_time=1.0).median

    matrix = torch.randn(args.matrix, args.matrix, device=device, dtype=dtype)
    peak = 2 * args.matrix**3 / seconds("m @ m", m=matrix)
    print(f"matrix product in {dtype}: {peak / 1e12:.3g} TFLOP/s")
    for rows in args.rows:
        queries = torch.randint(1, 50000, (rows, 345), device=device)
        responses = torch.randint(1, 50000, (rows, 53), device=device)

        def training_pass():
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logprobs, _, values = model(queries, responses, 0.7)
            ((logprobs - logprobs.detach()).exp().mean() + values.pow(2).mean()).backward()

        with FlopCounterMode(display=False) as counter:
            training_pass()
        flops = counter.get_total_flops()
        taken = seconds("f()", f=training_pass)
        print(f"{rows} rows: {flops / 1e12:.4g} TFLOP, {taken * 1e3:.1f} ms, share {flops / taken / peak:.3f}")


if __name__ == "__main__":
    main()
