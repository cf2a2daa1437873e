"""
benchmark/throughput.py: it runs the real scripts, counts what they need, and each of its flags does something; and
benchmark/speed.py: the line through the cost, the chart.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from conftest import ROOT, reset_accelerate
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

import ppo

sys.path.insert(0, str(ROOT / "benchmark"))
import speed  # noqa: E402
import throughput  # noqa: E402

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A folder with a config, as --shape takes it; its vocabulary is that of the tokenizer for made-up posts."""
    folder = tmp_path_factory.mktemp("shape") / "nano"
    GPTNeoXConfig(**SIZES, vocab_size=300, max_position_embeddings=1024).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def measure(shape, tmp_path, monkeypatch):
    """Run throughput.py in this process, its helper processes and the peak rate left out; returns the result."""
    monkeypatch.setenv("TLDR_DIR", "")
    monkeypatch.setattr(throughput, "in_another_process", lambda f, *a: f(*a) if f is throughput.make_inputs else 1e12)

    def run(*flags):
        reset_accelerate()
        for module in (throughput.sft, throughput.reward, throughput.ppo):  # put back what run_script replaces
            for name in ("log_metrics", "train", "rollout", "sample_responses", "ppo_update", "summed_nll", "pad_rows"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(module, name))
        out = tmp_path / "out.json"
        argv = ["throughput.py", "--shape", shape, "--work_dir", tmp_path / "work", "--out", out, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        throughput.main()
        return json.loads(out.read_text())[-1]

    return run


SMALL = ("--batch", 8, "--micro_batch", 4, "--updates", 2)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_times_the_updates_of_each_stage(stage, measure):
    result = measure("--stage", stage, *SMALL)
    assert len(result["updates"]) == 2 and result["stage"] == stage
    seconds = sorted(update["seconds"] for update in result["updates"])
    assert result["seconds_per_update"] == pytest.approx(sum(seconds) / 2)
    assert result["episodes_per_second"] == pytest.approx(8 / result["seconds_per_update"])
    needed = result["needed_gflop_per_episode"] * 8
    rates = [needed / update["seconds"] / 1e3 for update in result["updates"]]  # the peak stands for 1,000 GFLOP/s
    assert min(rates) * 0.5 < result["utilisation"] < max(rates) * 2 < 1
    if stage == "ppo":
        assert sum(result["phases"].values()) == pytest.approx(result["seconds_per_update"], rel=0.2)
        assert result["mean_response"] == 53 and 100 < result["mean_tokens"] < 53 + 512


def test_flags_change_the_work(measure, capsys):
    alike = ("--same_posts", "--warm_up", 0, "--epochs", 1, "--response_length", 12)
    result = measure(*SMALL, *alike, "--mean_response", 6, "--min_query", 200, "--max_query", 220)
    assert len(result["updates"]) == 2 and 3 < result["mean_response"] < 9
    assert 200 <= result["mean_tokens"] - result["mean_response"] <= 220
    assert result["posts"].endswith("the same in every update") and "fp32" in capsys.readouterr().out
    more = measure(*SMALL, "--same_posts", "--epochs", 2, "--response_length", 12, "--bf16", "--rollout_batch", 4)
    assert more["precision"] == "bf16" and more["mean_response"] == 12
    printed = json.loads((measure_folder(more) / "args.json").read_text())["args"]
    assert printed["bf16"] and printed["local_rollout_forward_batch_size"] == 4
    measure("--stage", "sft", *SMALL, "--flags", "--response_loss_only")
    assert json.loads((measure_folder(more, "sft") / "args.json").read_text())["args"]["response_loss_only"]


def measure_folder(result, stage="ppo"):
    """Where the script of a measurement wrote: its command names the work folder."""
    words = result["command"].split()
    return throughput.Path(words[words.index("--work_dir") + 1]) / f"{stage}-nano" / "output"


def test_needed_operations_are_those_that_a_counter_sees(shape):
    """One row without padding: PyTorch's own counter against the formula, attention's products left aside."""
    config = throughput.model_config(shape)
    config.num_labels, config.pad_token_id = 1, 299
    config._attn_implementation = "eager"  # products that the counter can tell apart
    policy = AutoModelForCausalLM.from_config(config).eval()
    value = ppo.ScalarModel(AutoModelForSequenceClassification.from_config(config)).eval()
    queries, responses = torch.randint(0, 299, (1, 70)), torch.randint(0, 299, (1, 12))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ppo.PolicyAndValue(policy, value)(queries, responses, 1.0)
    counted = counter.get_flop_counts()["Global"]
    products = {str(name): flops for name, flops in counted.items() if "bmm" not in str(name)}
    head_of_value = 2 * 32 * 82  # one output per token: left out of the formula
    # The last MLP of each works where its output is read, and not at the other 70 positions. The formula counts them.
    mlp = 2 * 2 * config.hidden_size * config.intermediate_size * 70
    needed, attention = throughput.needed_operations("ppo", config, [(82, 12)], epochs=0)  # 2 F + 2 C
    assert sum(products.values()) - head_of_value == needed / 2 - 2 * mlp
    whole = sum(flops for name, flops in counted.items() if "bmm" in str(name))
    assert attention / 2 == whole / 2  # the half above the diagonal left out
    trained, _ = throughput.needed_operations("ppo", config, [(82, 12)], epochs=4)
    assert trained == 7 * needed
    body = throughput.body_weights(config)
    assert throughput.needed_operations("reward", config, [(82, 0), (60, 0)], 4)[0] == 3 * 2 * body * 142
    sft = throughput.needed_operations("sft", config, [(82, 12)], 4)[0]
    assert sft - throughput.needed_operations("sft", config, [(82, 12)], 4, response_only=True)[0] == 6 * 9600 * 69


def test_command_for_a_gpu_at_a_small_shape(shape, tmp_path):
    """The very command of the header for a large model on a GPU, its sizes aside, in processes of its own."""
    flags = ["--bf16", "--batch", "8", "--micro_batch", "4", "--rollout_batch", "4", "--updates", "1"]
    command = [sys.executable, str(ROOT / "benchmark/throughput.py"), "--shape", shape, *flags]
    command += ["--work_dir", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert result["precision"] == "bf16" and 0 < result["utilisation"] < 1 and result["matrix_peak_gflops"] > 1
    for phase in ("generate", "score", "train"):
        assert f"  {phase} " in done.stdout and result["phases"][phase] > 0


def test_line_through_the_cost():
    """Points on a line are off by nothing; one that is 10% above shows as nearly that, at either end."""
    x = [32, 64, 128, 256, 512]
    intercept, slope, off = speed.fit_line(x, [1.5 + 0.2 * value for value in x])
    assert (intercept, slope) == (pytest.approx(1.5), pytest.approx(0.2)) and off < 1e-9
    for place in (0, 4):
        seconds = [1.5 + 0.2 * value for value in x]
        seconds[place] *= 1.3
        assert 0.03 < speed.fit_line(x, seconds)[2] < 0.3
    # Quadratic growth is no line.
    assert speed.fit_line(x, [1e-3 * value**2 for value in x])[2] > 0.5


def test_chart_of_the_results(tmp_path):
    """Drawn anew from the committed results: whole, and of the size of the committed one."""
    args = SimpleNamespace(out=tmp_path / "speed.png")
    speed.draw(args)
    assert matplotlib.image.imread(args.out).shape[2] == 4
    assert not list(tmp_path.glob("*.tmp"))
