"""
throughput.py: how fast sft.py, reward.py and ppo.py are, and how near that is to what the machine can do.

    python benchmark/throughput.py --shape 14m                                      # PPO; prints a table, writes JSON
    python benchmark/throughput.py --shape 160m --batch 16 --micro_batch 4 --updates 5 --out results/x.json
    python benchmark/throughput.py --shape 1b --bf16 --batch 512 --micro_batch 16 --rollout_batch 256 --updates 3
    accelerate launch --config_file FILE benchmark/throughput.py --stage sft --shape 70m

It runs the `main()` of the script itself, with flags, on a model of the shape that is asked for, with random weights.
The script's own functions are timed from outside, update by update; the first one (allocation, caches) is left out,
unless --warm_up 0 says that it shall count.
Beside the wall clock stand the processor seconds of the process, and how many cores other processes kept busy.

Posts are those of $TLDR_DIR/posts, with the tokenizer beside them. Without that folder they are made up: one token per
character, query lengths from a normal distribution of mean 344 and standard deviation 110 between 60 and 512, which is
about that of the real posts, and summaries of 33 tokens.

How long responses become is a property of the model that is built, for GPT-NeoX shapes: one coordinate of its last
hidden state is the constant 1, so one entry of the head is a bias of EOS. By default EOS is never sampled, and every
response has --response_length tokens; with --mean_response 35 every token is EOS with the same probability, such that
35 is the mean of the lengths. Other configs sample EOS as their random weights will.

Needed operations, 2 per multiply and add, for a row of T tokens of which R are the response's:
    F = 2 N T + 2 V d R     one forward pass of the policy: N weights in the matrices of the body, V x d in the head
    C = 2 N T               one forward pass of the value or reward model
    PPO     2 F + 2 C + epochs x 3 (F + C)      rollout: policy, reference, value, reward; backward = 2 x forward
    SFT     3 (2 N T + 2 V d (T - 1))           with the loss on the response only: R instead of T - 1
    reward  3 C for each of the two rows of a pair
No padding, no logits of the prompt, nothing twice; sampling counts as part of the F of the rollout. Every layer counts
at every position, though the scripts leave out most of the last MLP (`last_mlp_at`): 5% of all at the 160m shape.
The products of attention itself, 2 d L T^2 per forward pass with the half above the diagonal left out, are not in it;
they are given beside it. Utilisation = needed operations / (seconds x the best rate of a square matrix product in the same run).
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402
from transformers import AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast  # noqa: E402

import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402

SHAPES = {  # hidden size, layers, heads, intermediate size
    "14m": (128, 6, 4, 512),
    "70m": (512, 6, 8, 2048),
    "160m": (768, 12, 12, 3072),
    "410m": (1024, 24, 16, 4096),
    "1b": (2048, 16, 8, 8192),
    "2.8b": (2560, 32, 32, 10240),
}
TEMPERATURE = 0.7


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("sft", "reward", "ppo"), default="ppo")
    add("--shape", default="14m", help=f"one of {', '.join(SHAPES)}, or a folder or file with a config")
    add("--batch", type=int, default=16, help="rows (pairs) per update and process")
    add("--micro_batch", type=int, default=4, help="rows (pairs) per training pass and process")
    add("--rollout_batch", type=int, help="rows sampled at a time per process; default: all of the batch")
    add("--updates", type=int, default=5, help="updates that are timed")
    add("--warm_up", type=int, default=1, help="updates before them that are not")
    add("--epochs", type=int, default=4, help="PPO epochs")
    add("--response_length", type=int, default=53)
    add("--mean_response", type=float, help="mean response length; default: no response ends")
    add("--bf16", action="store_true")
    add("--min_query", type=int, default=0, help="only posts with at least so many query tokens")
    add("--max_query", type=int, default=512, help="only posts with at most so many query tokens")
    add("--same_posts", action="store_true", help="as many posts as the batch has rows, evenly spaced in the order of "
        "their lengths, and no more: every update is the same work")  # fmt: skip
    add("--work_dir", default="runs/throughput", help="where models, posts and output go")
    add("--out", help="JSON file to add the result to, as one entry of a list")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the script, at the end of the line")
    return parser.parse_args()


# ---- What the script is given: tokenizer, models, data ---------------------------------------------------------------
def make_tokenizer(folder):
    """The real tokenizer where there is one, else one with a token per byte."""
    real = os.path.join(os.environ.get("TLDR_DIR", ""), "pythia_tokenizer")
    if os.path.isdir(real):
        tokenizer = AutoTokenizer.from_pretrained(real)
    else:
        vocab = {token: i for i, token in enumerate(["<|endoftext|>"] + sorted(pre_tokenizers.ByteLevel.alphabet()))}
        made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return tokenizer


def model_config(shape):
    if shape not in SHAPES:
        return AutoConfig.from_pretrained(shape)
    hidden, layers, heads, intermediate = SHAPES[shape]
    sizes = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
    sizes |= dict(num_attention_heads=heads, vocab_size=50304)
    return GPTNeoXConfig(**sizes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0)


def eos_bias(model, num_ids, mean_response, response_length):
    """The EOS logit at which responses have the wanted mean length, the others being random as they are."""
    if mean_response is None:
        return -1000.0  # never
    low, high = 1e-9, 1.0  # bisection for the chance of EOS at every token: (1 - (1 - p)^R) / p is the mean length
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** response_length) / p > mean_response else (low, p)
    weights = model.get_output_embeddings().weight
    spread = weights[1:num_ids].std().item() * (weights.shape[1] - 1) ** 0.5 / TEMPERATURE
    mass = (num_ids - 2) * torch.tensor(0.5 * spread**2).exp().item()  # of the other tokens: their logits are normal
    return TEMPERATURE * torch.tensor(p / (1 - p) * mass).log().item()


@torch.no_grad()
def make_models(args, config, folder):
    """An SFT model and a reward model of the shape, with random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(f"{folder}/sft")
    tokenizer.save_pretrained(f"{folder}/reward")
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    if config.model_type == "gpt_neox":
        norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings().weight
        norm.weight[0], norm.bias[0] = 0.0, 1.0  # the constant coordinate
        head[:, 0] = 0.0
        head[tokenizer.eos_token_id, 0] = eos_bias(model, len(tokenizer), args.mean_response, args.response_length)
    model.save_pretrained(f"{folder}/sft")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(f"{folder}/reward")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(args, folder):
    """Posts and comparisons: the real ones with queries of the wanted lengths, or made-up ones. Returns where from."""
    real, made = os.environ.get("TLDR_DIR", ""), random.Random(0)
    if os.path.isdir(os.path.join(real, "posts")):
        posts = ppo.load_split(f"{real}/posts", "train", ["id", "subreddit", "title", "post", "summary"], "TLDR_DIR")
        pairs = reward.load_split(f"{real}/comparisons", "train", ["info", "summaries", "choice", "batch"], "TLDR_DIR")
        tokenizer, posts = AutoTokenizer.from_pretrained(f"{folder}/sft"), posts.to_list()
        texts = ["".join(ppo.post_parts(row["subreddit"], row["title"], row["post"])) for row in posts]
        lengths = [min(512, len(ids)) for ids in tokenizer(texts)["input_ids"]]
        order = sorted(range(len(posts)), key=lambda i: lengths[i])
        posts = [posts[i] for i in order if args.min_query <= lengths[i] <= args.max_query]
        pairs, source = pairs.to_list(), "TL;DR posts"
    else:
        posts, pairs, source = [], [], "made-up posts, query tokens normal(344, 110) within 60 and 512"
        while len(posts) < 2000:
            length = round(made.gauss(344, 110))
            if max(60, args.min_query) <= length <= min(512, args.max_query):
                text = "".join(made.choices("abcdefgh ", k=length - len("".join(ppo.post_parts("a", "b", "")))))
                row = dict(id=str(len(posts)), subreddit="a", title="b", post=text, summary="c" * 32)
                posts.append(row)
                summaries = [dict(text=" " + letter * 32, policy="a", note=None) for letter in "de"]
                pairs.append(dict(info=row, summaries=summaries, choice=len(posts) % 2, batch="batch0"))
        posts.sort(key=lambda row: len(row["post"]))
    if args.same_posts:
        posts = [posts[int((i + 0.5) * len(posts) / args.batch)] for i in range(args.batch)]
        source += ", the same in every update"
    write_rows(folder / "posts" / "train.jsonl", posts)
    write_rows(folder / "pairs" / "train.jsonl", pairs)
    return source


def make_inputs(args, config, folder):
    make_models(args, config, folder)
    return make_data(args, folder)


def script_flags(args, folder):
    """The flags with which the script is run."""
    flags = {"output_dir": folder / "output", "local_micro_batch_size": args.micro_batch}
    flags |= {"gradient_accumulation_steps": args.batch // args.micro_batch}
    flags |= {"total_episodes": (args.warm_up + args.updates) * args.batch * PartialState().num_processes}
    if args.stage == "ppo":
        flags |= {"sft_model_path": folder / "sft", "reward_model_path": folder / "reward"}
        flags |= {"query_dataset": folder / "posts", "num_ppo_epochs": args.epochs, "temperature": TEMPERATURE}
        flags |= {"response_length": args.response_length, "print_samples_every": 0}
        flags |= {"local_rollout_forward_batch_size": args.rollout_batch or args.batch}
    elif args.stage == "sft":
        flags |= {"base_model": folder / "sft", "query_dataset": folder / "posts", "print_samples_every": 0}
    else:
        flags |= {"sft_model_path": folder / "sft", "label_dataset": folder / "pairs"}
        flags |= {"query_dataset": folder / "posts", "normalization_rows": 1}
    flags = [str(part) for name, value in flags.items() for part in (f"--{name}", value)] + ["--bf16"] * args.bf16
    return flags + args.flags


# ---- Measuring -------------------------------------------------------------------------------------------------------
def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def watch(module, name, calls):
    """Replace a function of the script by itself with a stopwatch: appends (end, seconds, arguments, result)."""
    function = getattr(module, name)

    def watched(*arguments, **named):
        synchronize()
        begin = time.perf_counter()
        result = function(*arguments, **named)
        synchronize()
        calls.setdefault(name, []).append((time.perf_counter(), time.perf_counter() - begin, arguments, result))
        return result

    setattr(module, name, watched)


def others_cores(since=None):
    """Processor cores that other processes kept busy since the last reading; None where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            ticks = list(map(int, file.readline().split()[1:9]))
    except OSError:
        return None, None
    own = resource.getrusage(resource.RUSAGE_SELF)
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait
    now = busy, own.ru_utime + own.ru_stime, time.perf_counter()
    if since is None:
        return now, None
    busy, mine, wall = [after - before for after, before in zip(now, since)]
    return now, round(max(0.0, busy - mine) / wall, 3)


def in_another_process(function, *arguments):
    """What a function returns, without its memory in the peak of this process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def matrix_peak(bf16):
    """The best rate of a square matrix product, in operations per second."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16 if bf16 else torch.float32
    best = 0.0
    for size in (1024, 2048, 4096) if device == "cpu" else (4096, 8192):
        a, b = torch.randn((2, size, size), device=device).to(dtype)
        for _ in range(6 if size < 4096 else 3):
            synchronize()
            begin = time.perf_counter()
            a @ b
            synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def body_weights(config):
    """Weights in the matrices of the body, embeddings left out; counted without memory on the meta device."""
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(config).base_model
    matrices = [m for m in body.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    return sum(matrix.weight.numel() for matrix in matrices)


def needed_operations(stage, config, rows, epochs, response_only=False):
    """Needed operations and those of attention, for rows of (tokens, tokens of the response): see the header."""
    n, head = body_weights(config), 2 * config.vocab_size * config.hidden_size
    attention = sum(2 * config.hidden_size * config.num_hidden_layers * t**2 for t, _ in rows)  # per forward pass
    c = sum(2 * n * t for t, _ in rows)
    if stage == "ppo":
        f = c + sum(head * r for _, r in rows)
        return (2 + 3 * epochs) * (f + c), 2 * (2 + 3 * epochs) * attention
    if stage == "sft":
        return 3 * (c + sum(head * (r if response_only else t - 1) for t, r in rows)), 3 * attention
    return 3 * c, 3 * attention


def run_script(args, folder):
    """Run the script; per timed update: seconds, phases, rows of (tokens, response tokens), cores of others."""
    module, calls = {"sft": sft, "reward": reward, "ppo": ppo}[args.stage], {}
    for name in {"ppo": ("rollout", "sample_responses", "ppo_update"), "sft": ("summed_nll",)}.get(args.stage, ()):
        watch(module, name, calls)
    if args.stage == "reward":
        watch(module, "pad_rows", calls)
    clocks = []  # at the start of the first update and at the end of every one

    def look():
        now, cores = others_cores(clocks[-1][2] if clocks else None)
        clocks.append((time.perf_counter(), time.process_time(), now, cores))

    def mark(metrics, *rest, log=module.log_metrics):
        log(metrics, *rest)
        look()

    def start(*arguments, train=module.train):
        synchronize()
        look()
        return train(*arguments)

    module.log_metrics, module.train = mark, start
    sys.argv = [f"{args.stage}.py", *script_flags(args, folder)]
    module.main()
    updates, timed = [], clocks[args.warm_up : args.warm_up + args.updates + 1]
    for (begin, cpu_begin, *_), (end, cpu_end, _, cores) in zip(timed, timed[1:]):
        inside = {name: [call for call in found if begin < call[0] <= end] for name, found in calls.items()}
        update = {"seconds": end - begin, "cpu_seconds": cpu_end - cpu_begin, "other_cores": cores}
        if args.stage == "ppo":
            generate, roll, train = [inside[name][0][1] for name in ("sample_responses", "rollout", "ppo_update")]
            update |= {"generate": generate, "score": roll - generate, "train": train}
            batch = inside["rollout"][0][3]
            columns = batch["row_lengths"], batch["sequence_lengths"] + 1
            update["rows"] = list(zip(*[column.tolist() for column in columns]))
        elif args.stage == "sft":
            batches = [call[2][3] for call in inside["summed_nll"]]
            rows = [row for batch in batches for row in zip(batch["tokens"], batch["query_tokens"])]
            update["rows"] = [(len(both), len(both) - len(query)) for both, query in rows]
        else:
            update["rows"] = [(len(row), 0) for call in inside["pad_rows"] for row in call[2][0]]
        updates.append(update)
    return updates


def describe_machine():
    if torch.cuda.is_available():
        return f"{PartialState().num_processes} x {torch.cuda.get_device_name()}"
    vendor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        vendor = names[0] if names else vendor
    return f"{os.cpu_count()} cores of {vendor}, no GPU"


def main():
    args = parse_flags()
    command = "python benchmark/throughput.py " + " ".join(sys.argv[1:])
    state = PartialState()
    folder = Path(args.work_dir).resolve() / f"{args.stage}-{Path(args.shape).name}"
    config = model_config(args.shape)
    with state.main_process_first():
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            source = in_another_process(make_inputs, args, config, folder)
    peak = in_another_process(matrix_peak, args.bf16)
    updates = run_script(args, folder)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        gib = torch.cuda.max_memory_allocated() / 2**30
    peak = max(peak, in_another_process(matrix_peak, args.bf16))  # before and after: the machine at its best
    if not state.is_main_process:
        return
    per_process = 1 if args.stage == "ppo" else state.num_processes  # PPO's batch is that of all processes
    seconds = statistics.median(update["seconds"] for update in updates)
    rows = sum(len(update["rows"]) for update in updates) / len(updates) * per_process
    episodes = rows / 2 if args.stage == "reward" else rows
    tokens = [t for update in updates for t, _ in update["rows"]]
    response_only = "--response_loss_only" in args.flags
    operations, attention = zip(
        *[needed_operations(args.stage, config, update["rows"], args.epochs, response_only) for update in updates]
    )
    needed = [per_process * total for total in operations]
    utilisation = [n / (u["seconds"] * peak * state.num_processes) for n, u in zip(needed, updates)]
    result = {
        "stage": args.stage, "shape": args.shape, "precision": "bf16" if args.bf16 else "fp32",
        "machine": describe_machine(), "processes": state.num_processes, "batch": args.batch,
        "micro_batch": args.micro_batch, "posts": source, "mean_tokens": statistics.mean(tokens),
        "mean_response": statistics.mean(r for update in updates for _, r in update["rows"]),
        "episodes_per_second": episodes / seconds,
        "tokens_per_second": statistics.mean(tokens) * rows / seconds,
        "seconds_per_update": seconds,
        "cpu_seconds_per_update": statistics.median(update["cpu_seconds"] for update in updates),
        "phases": {
            name: statistics.median(update[name] for update in updates)
            for name in ("generate", "score", "train") if name in updates[0]
        },
        "peak_memory_gib": gib,
        "needed_gflop_per_episode": statistics.mean(needed) / episodes / 1e9,
        "attention_gflop_per_episode": per_process * statistics.mean(attention) / episodes / 1e9,
        "matrix_peak_gflops": peak / 1e9,
        "utilisation": statistics.median(utilisation),
        "updates": [{name: value for name, value in update.items() if name != "rows"} for update in updates],
        "command": command, "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }  # fmt: skip
    print(f"\n{args.stage} {args.shape} {result['precision']}, {result['machine']}, batch {args.batch}:")
    for name in ("episodes_per_second", "tokens_per_second", "seconds_per_update", "peak_memory_gib", "mean_tokens"):
        print(f"  {name:<30}{result[name]:.3f}")
    for name, value in result["phases"].items():
        print(f"  {name:<30}{value:.3f} s  {value / seconds:.1%}")
    for name in ("needed_gflop_per_episode", "attention_gflop_per_episode", "matrix_peak_gflops", "utilisation"):
        print(f"  {name:<30}{result[name]:.3f}")
    if args.out:
        found = json.loads(Path(args.out).read_text()) if os.path.exists(args.out) else []
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(found + [result], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
