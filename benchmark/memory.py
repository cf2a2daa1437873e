"""
How much memory do the three training scripts need? Parameters, gradients, optimizer states, frozen models, KV cache,
activations and logits in GiB per process, for a model size, a stage, an engine, a micro-batch and a number of GPUs.

    python benchmark/memory.py                                        # the table: what PPO needs, and where it fits
    python benchmark/memory.py --size 1b --stage ppo --gpus 8 --micro 16 --rollout 64      # one set-up, piece by piece
    python benchmark/memory.py --size FOLDER --stage sft --engine ddp --precision fp32     # any model folder
    python benchmark/memory.py --check --output benchmark/results/memory.json              # against measured peaks

How it is computed
    1. The model is the real class, built without memory: tensors of the meta device that carry the label "cpu" (torch's
       FakeTensorMode), so that attention takes the fused kernel, as it does on a GPU. Plain meta tensors would take
       the unfused one, which keeps a (B, heads, T, T) matrix that no run ever has.
    2. Forward and backward pass run on it, and every storage that comes and goes is entered in a ledger: what is there
       after the forward pass is what autograd keeps (activations), what is there at most beyond that is temporary.
       bf16 under DDP is autocast, with the CPU's list of operations, which treats these models' as the GPU's does.
    3. What the engine holds beside that (gradient buckets, partitions, fp32 masters) follows from its default settings,
       as in torch 2.13 and DeepSpeed 0.19. ZeRO-3 is a bound: what it keeps gathered depends on its trace.
    4. The peak is the largest sum of a phase: sampling, scoring, training pass, optimizer step. All rows are taken to
       be of the greatest length and no response to end early: the worst batch. PPO's statistics, a few MiB, are left
       out, and so are --run_eval and the workspaces of GPU kernels.
    5. RESERVE of a GPU is set aside for fragmentation, kernel workspaces and the CUDA context.
    6. --check compares with resident memory on a CPU in fp32. No figure for a GPU has been checked on a GPU.

Letters in shape comments: B rows, T tokens of a row, Q query tokens, R response tokens, N positions with logits, V
vocabulary.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from threading import Lock
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ppo import TokenLogprobs  # noqa: E402

GIB = 2**30
# hidden size, layers, heads, size of the MLP, vocabulary (padded): https://huggingface.co/EleutherAI
SIZES = {
    "1b": (2048, 16, 8, 8192, 50304),
    "2.8b": (2560, 32, 32, 10240, 50304),
    "6.9b": (4096, 32, 32, 16384, 50432),
}
# The paper's PPO, per GPU: micro-batch, rollout batch, frozen models offloaded.
PAPER = {"1b": (16, 64, False), "2.8b": (4, 32, False), "6.9b": (1, 4, True)}
LENGTHS = {"sft": 50, "reward": 126, "ppo": 53}  # response tokens beside 512 of the query: the scripts' longest rows
CARDS = {"80 GB": 79.1, "141 GB": 139.8}  # GiB that torch reports of such a GPU
RESERVE = 0.06  # share of a GPU that is left for fragmentation, kernel workspaces and the CUDA context
BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
PREFETCH = 50_000_000  # elements: ZeRO-3's prefetch_bucket_size
MAX_LIVE = 1_000_000_000  # elements: ZeRO-3's max_live_parameters, and the size of a sub-group in its step
ENGINES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


@dataclass(frozen=True)
class Job:
    """One set-up of one stage. Batches are per process: rows of PPO and SFT, pairs of the reward model."""

    size: str
    stage: str = "ppo"
    engine: str = "zero2"
    precision: str = "bf16"
    gpus: int = 8
    micro: int = 16
    accumulation: int = 4
    rollout: int = 64
    query: int = 512
    response: int = 53
    offload: bool = False
    gradient_checkpointing: bool = False
    cpu: bool = False
    """processes on a CPU, as --check runs them: frozen models never move, and untouched buffers take no memory"""

    @property
    def width(self) -> int:
        """Bytes of a number in parameters, gradients and frozen models; under DDP bf16 is autocast over fp32."""
        return 2 if self.precision == "bf16" and self.engine != "ddp" else 4

    @property
    def rows(self) -> int:
        """Rows of a training pass."""
        return 2 * self.micro if self.stage == "reward" else self.micro  # chosen and rejected in one pass


def fail(message: str):
    """End with one clear line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- Models without memory -------------------------------------------------------------------------------------------
def load_config(size: str):
    """The config of a Pythia size, or of a model folder; dropout off as in the scripts."""
    if size in SIZES:
        hidden, layers, heads, intermediate, vocabulary = SIZES[size]
        return GPTNeoXConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=intermediate, tie_word_embeddings=False,
        )  # fmt: skip
    if not os.path.exists(os.path.join(size, "config.json")):
        fail(f"--size {size}: it is none of {', '.join(SIZES)}, and no folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(size)
    except Exception as error:
        fail(f"--size {size}: its config.json cannot be read ({type(error).__name__})")
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float)):
            setattr(config, name, 0.0)
    return config


@contextmanager
def fake_models(mask: bool):
    """
    Where models are built and run without memory. With `mask`, attention gets one, as for left-padded queries; without,
    none: then it is causal by itself, as for rows padded on the right.
    """

    def create_causal_mask(inputs_embeds, past_key_values=None, **_):
        # The real one looks at values, which fake tensors do not have. What it returns is of the same size.
        if not mask:
            return None
        new = inputs_embeds.shape[1]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return torch.ones((inputs_embeds.shape[0], 1, new, seen + new), dtype=torch.bool)  # (B, 1, new, all)

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("transformers.models.")]
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        with patched_masks(modules, create_causal_mask):
            yield


@contextmanager
def patched_masks(modules, function):
    """Put `function` in the place of every `create_causal_mask` among some modules."""
    patches = [mock.patch.object(m, "create_causal_mask", function) for m in modules if "create_causal_mask" in vars(m)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def build(size: str, dtype: torch.dtype):
    """The language model of a size, without memory if called in `fake_models`. Its body is `model.base_model`."""
    return AutoModelForCausalLM.from_config(load_config(size), dtype=dtype)


@lru_cache
def parameter_sizes(size: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements of each parameter, in order: of the language model, and of a scalar model (body, head, and bias)."""
    with FakeTensorMode():
        model = build(size, torch.float32)
        body = [p.numel() for p in model.base_model.parameters()]
        return tuple(p.numel() for p in model.parameters()), (*body, model.config.hidden_size, 1)


def trained_sizes(job: Job) -> tuple[int, ...]:
    """Elements of each trained parameter, in the order of the module that the engine wraps."""
    language, scalar = parameter_sizes(job.size)
    return {"sft": language, "reward": scalar[:-1], "ppo": language + scalar}[job.stage]


# ---- What comes and goes in a pass -----------------------------------------------------------------------------------
class Ledger(TorchDispatchMode):
    """Within it, every new storage is counted while it lives: `live` and `peak` in bytes. Works on real tensors too."""

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self.storages = WeakIdKeyDictionary()
        for tensor in known:  # parameters and inputs are counted elsewhere
            self.storages[tensor.untyped_storage()] = None

    def grow(self, size: float):
        """`size` bytes more (or less) from now on."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.storages:  # a view, or the result of an operation in place, has an old one
                    self.storages[storage] = weakref.finalize(storage, self.grow, -storage.nbytes())
                    self.grow(storage.nbytes())
        return output


def autocast(job: Job):
    """The autocast of accelerate, which there is under DDP only: DeepSpeed's bf16 models are bf16 throughout."""
    on = job.precision == "bf16" and job.engine == "ddp"
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def training_loss(job: Job, model, head):
    """
    The forward pass of a micro-batch: a scalar loss. PPO: policy and value model (here the same network, run twice:
    autograd keeps the activations of both).
    """
    num_tokens = job.query + job.response  # T
    token_ids = torch.zeros((job.rows, num_tokens), dtype=torch.long)  # (B, T)
    if job.stage == "reward":
        hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, d)
        last = torch.full((job.rows,), num_tokens - 1)
        return head(hidden[torch.arange(job.rows), last]).squeeze(-1).float().sum()
    # The positions whose logits are computed: all but the last in SFT, those before the response's tokens in PPO.
    count = num_tokens - 1 if job.stage == "sft" else job.response
    before = torch.arange(num_tokens - 1 - count, num_tokens - 1).expand(job.rows, count)  # (B, N / B)
    logits = model(input_ids=token_ids, use_cache=False, logits_to_keep=before).logits.flatten(0, 1)  # (N, V)
    logprobs, _ = TokenLogprobs.apply(logits, torch.zeros(len(logits), dtype=torch.long), 1.0)  # (N,)
    loss = -logprobs.sum()
    if job.stage == "sft":
        return loss
    hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, T, d)
    return loss + head(hidden).squeeze(-1).float().gather(1, before).sum()


def owned_elements(job: Job) -> int:
    """Elements of the parameters that touch a process's partition, of the process that has most; whole parameters."""
    sizes = trained_sizes(job)
    share, start, owned = -(-sum(sizes) // job.gpus), 0, [0] * job.gpus
    for size in sizes:
        for process in range(start // share, (start + size - 1) // share + 1):
            owned[process] += size
        start += size
    return max(owned)


@lru_cache(maxsize=None)
def timeline(size: str, stage: str, engine: str, precision: str, micro: int, query: int, response: int, again: bool):
    """
    One forward and backward pass, with gradient checkpointing if `again`, without what the engine adds. Returns bytes
    kept after the forward pass, and for every gradient in the order of arrival (elements, bytes at most before it came,
    bytes when it came, bytes after it was given away).
    """
    job = Job(size, stage, engine, precision, micro=micro, query=query, response=response)
    dtype = torch.bfloat16 if job.width == 2 else torch.float32
    with fake_models(mask=False):
        model = build(size, dtype)
        head = torch.nn.Linear(model.config.hidden_size, 1, dtype=dtype)
        model.train(again)  # checkpointing acts in training mode only, and there is no dropout
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parameters, events = [*model.parameters(), *head.parameters()], []
        ledger = Ledger([*parameters, *model.buffers()])

        def arrive(parameter):
            here, most = ledger.live, ledger.peak
            parameter.grad = None
            ledger.peak = ledger.live
            events.append((parameter.numel(), most, here, ledger.live))

        with ledger:
            with autocast(job):
                loss = training_loss(job, model, head)
            held = ledger.live
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(arrive)
            loss.backward()
    return held, tuple(events)


def training_pass(job: Job) -> dict:
    """
    Bytes of a training pass: `activations` (kept by autograd, without the logits), `logits`, and `temporary`, what
    there is beyond both at most, with the buckets and gradients of this very micro-batch.
    """
    shape = (job.micro, job.query, job.response, job.gradient_checkpointing)
    held, events = timeline(job.size, job.stage, job.engine, job.precision, *shape)
    count = {"sft": job.rows * (job.query + job.response - 1), "reward": 0, "ppo": job.rows * job.response}
    logits = count[job.stage] * load_config(job.size).vocab_size * (2 if job.precision == "bf16" else 4)
    width, most, filled, owned = job.width, held, 0, 0
    zero = job.engine != "ddp"
    more = BUCKET * width if job.engine == "zero2" and not job.cpu else 0  # what the engine holds by now
    for elements, before, here, after in events:
        most = max(most, before + more)
        if zero and filled + elements > BUCKET:
            most, filled = max(most, here + more + filled * width * (job.gpus > 1)), 0
            more, owned = (more, owned) if owned else (more + owned_bytes(job), True)
        filled += elements
        # ZeRO copies a gradient into its bucket. On a CPU the bucket takes memory when it is first written. Under DDP
        # gradients are added to those of earlier micro-batches; where there are none, they stay as they come.
        if (zero and job.cpu) or (job.engine == "ddp" and job.accumulation == 1):
            more += elements * width
        most = max(most, after + more)
    if zero:  # the last bucket: slices for several processes are copied into one tensor, then each keeps its own
        most = max(most, after + more + filled * width * (job.gpus > 1))
        most = max(most, after + more + (0 if owned else owned_bytes(job)))
    return {"activations": held - logits, "logits": logits, "temporary": most - held}


def owned_bytes(job: Job) -> int:
    """Bytes in which a process of ZeRO-2 keeps the gradients that touch its partition."""
    return owned_elements(job) * job.width if job.engine == "zero2" else 0


@lru_cache(maxsize=None)
def scoring_peak(size: str, engine: str, precision: str, rows: int, query: int, response: int) -> int:
    """Bytes that a scoring pass over rows of Q + R tokens has at most: no gradients, so only what is just needed."""
    job = Job(size, engine=engine, precision=precision, micro=rows, query=query, response=response)
    with fake_models(mask=False), torch.no_grad():
        model = build(size, torch.bfloat16 if job.width == 2 else torch.float32)
        head = torch.nn.Linear(model.config.hidden_size, 1, dtype=model.dtype)
        with Ledger([*model.parameters(), *model.buffers(), *head.parameters()]) as ledger, autocast(job):
            training_loss(job, model, head)
    return ledger.peak


@lru_cache(maxsize=None)
def generation(size: str, engine: str, precision: str, rows: int, query: int, response: int) -> dict:
    """Bytes of sampling: `cache` (keys and values at the end), and `peak`, at most, the cache included."""
    # Under ZeRO-3 it is done by a spare copy in fp32.
    precise = precision == "fp32" or engine == "zero3"
    job = Job(size, engine=engine, precision="fp32" if precise else precision)
    with fake_models(mask=True), torch.no_grad():
        model = build(size, torch.bfloat16 if job.width == 2 else torch.float32).eval()
        peaks = []
        # The prompt; and the last token that is fed (the last that is sampled is not), after all tokens before it.
        for prompt, last in ((query, False), (query + max(response, 2) - 2, True)):
            with Ledger([*model.parameters(), *model.buffers()]) as ledger, autocast(job):
                ids = torch.zeros((rows, prompt), dtype=torch.long)
                places = torch.arange(prompt).expand(rows, prompt)
                output = model(input_ids=ids, position_ids=places, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                if last:
                    ledger.peak = ledger.live
                    del output
                    output = model(
                        input_ids=ids[:, :1], position_ids=places[:, :1], past_key_values=cache, use_cache=True
                    )
                # The tail of `generate` in ppo.py.
                logits = output.logits[:, -1].float() / 0.7  # (B, V)
                cdf = logits.double().softmax(-1).cumsum(-1)  # (B, V)
            peaks.append(ledger.peak)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        size = sum(t.untyped_storage().nbytes() for t in tensors)
        del cdf, output, cache, tensors
    return {"cache": size, "peak": max(peaks)}


# ---- The phases ------------------------------------------------------------------------------------------------------
def phases(job: Job, passes: bool = True) -> dict[str, dict[str, float]]:
    """Bytes per process: phase -> piece -> bytes. The largest sum is the peak. Without `passes`: the step only."""
    trained, width, n = sum(trained_sizes(job)), job.width, job.gpus
    share = -(-trained // n)  # elements of a ZeRO partition
    language, scalar = (sum(sizes) for sizes in parameter_sizes(job.size))
    base = {"parameters": trained * width, "optimizer states": 8 * trained}  # both of AdamW's moments, fp32
    gradients = {"gradients": width * trained}
    if job.engine == "ddp" and n > 1:
        base["engine"] = width * trained  # DDP's buckets, a second copy of the gradients
    if job.engine == "zero2":
        base["optimizer states"] = 12 * share  # moments and fp32 masters
        # Gradients of earlier micro-batches wait in one buffer per process, those of this one are in the buckets.
        gradients = {"gradients": owned_bytes(job) * (job.accumulation > 1)}
    if job.engine == "zero3":
        gathered = min(trained, MAX_LIVE) * width
        base |= {"parameters": share * width, "optimizer states": 12 * share}
        base["engine"] = width * (min(BUCKET, trained) if job.cpu else BUCKET)
        base["spare"] = 4 * (scalar if job.stage == "reward" else language)
        gradients = {"gradients": share * width}
        base["gradients"] = gradients["gradients"]  # one flat buffer, there from the beginning
    frozen, brought = 0, 0
    if job.stage == "ppo":
        frozen = (language + scalar) * width
        if job.offload and not job.cpu:
            # By DeepSpeed: a layer and what is fetched ahead; otherwise both models come for the scoring and go.
            brought = frozen if job.engine == "ddp" else width * (PREFETCH + max(parameter_sizes(job.size)[0]))
            frozen = 0
    base["frozen models"] = frozen
    # DeepSpeed copies the parameters into one flat buffer. (Where a GPU has no room for both, it does so on the CPU.)
    out = {}
    if job.engine == "zero2":
        start = {"parameters": 2 * trained * width, "frozen models": 4 * (language + scalar) * (job.stage == "ppo")}
        out["prepare"] = start if job.cpu else start | {"frozen models": 0}
    shape = (job.size, job.engine, job.precision)
    if job.stage == "ppo" and passes:
        sampled = generation(*shape, job.rollout, job.query, job.response)
        pieces = {"KV cache": sampled["cache"], "temporary": sampled["peak"] - sampled["cache"]}
        out["generate"] = base | pieces
        scored = {"temporary": scoring_peak(*shape, job.micro, job.query, job.response)}
        if job.engine == "zero3":
            scored["parameters"] = base["parameters"] + gathered
        out["score"] = base | scored | {"frozen models": frozen + brought}
    made = training_pass(job) if passes else {}
    # Without accumulation, DDP's gradients come to be as the activations go: they are in `temporary`.
    out["train"] = base | (gradients if job.engine != "ddp" or job.accumulation > 1 else {}) | made
    if job.engine == "zero3":
        out["train"]["parameters"] = base["parameters"] + gathered
    out["step"] = base | gradients
    if job.engine == "zero2":
        # The partition's gradients, once more as one flat tensor, and again in fp32.
        out["step"] |= {"gradients": owned_bytes(job), "temporary": share * width + (4 * share if width == 2 else 0)}
        if job.cpu and n > 1:  # gloo gathers the parameters through a copy of them all
            gathering = base | {"gradients": 0, "temporary": trained * width}
            out["step"] = max(out["step"], gathering, key=lambda phase: sum(phase.values()))
    if job.engine == "zero3":
        out["step"]["temporary"] = 4 * min(share, MAX_LIVE)
    return out


def peak(job: Job) -> float:
    """Bytes that a process needs at most. On a GPU without room to prepare, that is done in the CPU's memory."""
    return max(sum(pieces.values()) for name, pieces in phases(job).items() if name != "prepare" or job.cpu)


def host_memory(job: Job, per_node: int = 8) -> tuple[float, float]:
    """CPU bytes of a node: while every process loads its networks in fp32, and later, for frozen models offloaded."""
    language, scalar = (sum(sizes) for sizes in parameter_sizes(job.size))
    frozen = (language + scalar) * (job.stage == "ppo")
    here = min(job.gpus, per_node)
    loading = 4 * (sum(trained_sizes(job)) + frozen)
    if job.engine == "zero3":
        loading += 4 * (scalar if job.stage == "reward" else language)  # the spare, before it moves
    # DeepSpeed spreads the frozen models over all processes; otherwise each has both.
    later = frozen * (4 * here if job.engine == "ddp" else job.width * here / job.gpus) * job.offload
    return loading * here, later


# ---- Tables ----------------------------------------------------------------------------------------------------------
def breakdown(job: Job) -> str:
    """What each phase of a set-up holds, as a table in GiB."""
    columns = phases(job)
    names = list(dict.fromkeys(name for pieces in columns.values() for name in pieces))
    lines = [f"{'GiB per process':<20}" + "".join(f"{name:>12}" for name in columns)]
    for name in names:
        lines.append(f"{name:<20}" + "".join(f"{pieces.get(name, 0) / GIB:>12.2f}" for pieces in columns.values()))
    lines.append(f"{'sum':<20}" + "".join(f"{sum(pieces.values()) / GIB:>12.2f}" for pieces in columns.values()))
    loading, later = host_memory(job)
    largest = peak(job) / GIB
    lines.append(f"peak {largest:.2f} GiB per process" + "; 'prepare' is no part of it" * ("prepare" in columns))
    for card, capacity in CARDS.items():
        verdict = "fits" if largest <= capacity * (1 - RESERVE) else "does not fit"
        lines.append(f"{verdict} a GPU of {card} ({capacity:.1f} GiB, {RESERVE:.0%} of it in reserve)")
    lines.append(f"CPU memory per node: {loading / GIB:.0f} GiB while loading, then {later / GIB:.0f} GiB of offload")
    return "\n".join(lines)


def remedies(job: Job):
    """Yield (what to change, the changed set-up): each remedy alone, then more and more of them together."""
    single = {} if job.gradient_checkpointing else {"--gradient_checkpointing": {"gradient_checkpointing": True}}
    micro = job.micro // 2
    while micro:
        smaller = {"micro": micro, "accumulation": job.accumulation * job.micro // micro}
        single[f"--local_micro_batch_size {micro}"] = smaller | {"rollout": job.rollout * micro // job.micro or 1}
        micro //= 2
    if not job.offload:
        single["--offload"] = {"offload": True}
    single["ZeRO-3"] = {"engine": "zero3"}
    for name, change in single.items():
        yield name, replace(job, **change)
    names, changes = [], {}
    for name, change in single.items():
        if "micro_batch" in name and "--local_micro_batch_size 1" != name:
            continue  # together with others: at once the smallest
        names, changes = [*names, name], changes | change
        if len(names) > 1:
            yield " + ".join(names), replace(job, **changes)


def fits(job: Job, room: float) -> bool:
    """Whether a set-up fits in `room` bytes; the passes are only run where the rest leaves something for them."""
    return sum(phases(job, passes=False)["step"].values()) <= room and peak(job) <= room


def paper_rows() -> list[dict]:
    """PPO with the paper's settings, ZeRO-2 in bf16, on 1 to 8 GPUs of both kinds."""
    rows = []
    for size, (micro, rollout, offload) in PAPER.items():
        for gpus in (1, 2, 4, 8):
            batch = dict(micro=micro, accumulation=512 // micro // gpus, rollout=rollout)
            job = Job(size, gpus=gpus, offload=offload, **batch)
            sums = {name: sum(pieces.values()) / GIB for name, pieces in phases(job).items()}
            row = {"size": size, "gpus": gpus, "micro": micro, "rollout": rollout, "offload": offload}
            row |= {"phases": sums, "peak": peak(job) / GIB, "host": [b / GIB for b in host_memory(job)]}
            for card, capacity in CARDS.items():
                room = capacity * (1 - RESERVE) * GIB
                row[card] = "fits"
                if peak(job) > room:
                    found = (name for name, changed in remedies(job) if fits(changed, room))
                    row[card] = f"does not fit; {next(found, 'nor with all remedies')}"
            rows.append(row)
    return rows


def paper_table(rows: list[dict]) -> str:
    """The rows as the README shows them: GiB per GPU, and per node for the CPU's memory."""
    head = ["model", "GPUs", "micro", "rollout", "generate", "score", "train", "step", "peak", *CARDS]
    lines = ["| " + " | ".join([*head, "CPU: loading", "CPU: offload"]) + " |", "|---" * (len(head) + 2) + "|"]
    for row in rows:
        cells = [row["size"] + " offload" * row["offload"], row["gpus"], row["micro"], row["rollout"]]
        cells += [f"{row['phases'][name]:.1f}" for name in ("generate", "score", "train", "step")]
        cells += [f"**{row['peak']:.1f}**", *(row[card] for card in CARDS), *(f"{value:.0f}" for value in row["host"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# ---- Against measured peaks ------------------------------------------------------------------------------------------
SMALL = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024, vocab_size=50304)
PASSES = Lock()
SMALL_LENGTHS = {"sft": (510, 50), "reward": (510, 126), "ppo": (510, 53)}  # of the rows that `make_world` writes
CHECKS = [  # stage, engine, processes, micro-batch, accumulation, rollout batch, gradient checkpointing
    ("sft", "ddp", 1, 2, 2, 1, False),
    ("sft", "zero2", 2, 2, 2, 1, False),
    ("reward", "ddp", 1, 2, 2, 1, False),
    ("reward", "zero2", 2, 2, 2, 1, False),
    ("ppo", "ddp", 1, 2, 2, 4, False),
    ("ppo", "ddp", 1, 4, 1, 4, True),
    ("ppo", "zero2", 2, 2, 2, 4, False),
]


def make_world(folder: Path):
    """Random models (a language model and a reward model), a tokenizer of words, and posts and pairs of one length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SMALL, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    config.num_labels = 1
    config.pad_token_id = len(words)  # the scripts' [PAD]
    for name, kind in (("base", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    # "SUBREDDIT:", "r/w1", "TITLE:", "w2", "POST:", the post, "TL;DR:": 510 tokens. Then a summary and EOS.
    post = {"subreddit": "w1", "title": "w2", "post": " ".join(["w3"] * 504)}
    posts = [{"id": str(i), **post, "summary": " ".join(["w4"] * 49)} for i in range(64)]
    pairs = []
    for i in range(64):
        info = {"id": str(i), **post, "article": None, "site": None}
        texts = [{"text": " " + " ".join([word] * 125), "policy": "sup", "note": None} for word in ("w5", "w6")]
        pairs.append({"info": info, "summaries": texts, "choice": 0, "worker": "w", "batch": "b", "split": "train"})
    for name, rows in (("posts", posts), ("pairs", pairs)):
        (folder / name).mkdir()
        for split in ("train", "validation"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def resident(name: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def warm_up():
    """Load what is loaded late: libraries, kernels, DeepSpeed. One step of a model of a few KiB."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    logits = model(torch.zeros((2, 8), dtype=torch.long)).logits.flatten(0, 1)
    TokenLogprobs.apply(logits, torch.zeros(len(logits), dtype=torch.long), 1.0)[0].sum().backward()
    optimizer.step()


def worker(stage: str, folder: str, flags: list[str]):
    """One process of a run of the real script: notes its memory before the models, and its peak after the updates."""
    module, note = __import__(stage), {}
    module.keep_freed_memory = lambda: None  # see `measure`

    def observed(function, before):
        def call(*args, **kwargs):
            before(args)
            return function(*args, **kwargs)

        return call

    def begin(_):
        if not note:
            warm_up()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what there is now
            note["baseline"] = resident("VmRSS")

    def end(args):
        update, num_updates = args[4:6]
        if update == num_updates:  # what saving takes is no part of training
            note["peak"] = resident("VmHWM")
            Path(folder, f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(note))
            time.sleep(2)  # the other process may still be reading what this one sent
            os._exit(0)

    load = {"sft": "load_causal_lm", "reward": "load_classifier", "ppo": "load_networks"}[stage]
    setattr(module, load, observed(getattr(module, load), begin))
    module.save_or_stop = observed(module.save_or_stop, end)
    sys.argv = [f"{stage}.py", *flags]
    module.main()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def measure(job: Job, world: Path, out: Path) -> dict:
    """
    Run two updates of a real script on the CPU: baseline and peak resident memory of the largest process.

    The C library's heap is kept out of it: freed memory is given back at once. The scripts' `keep_freed_memory`, and
    holes in the heap without it, add to a CPU's resident memory what no GPU has: up to twice as much on small models.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    batch = job.micro * job.accumulation * job.gpus
    flags = ["--total_episodes", 2 * batch, "--local_micro_batch_size", job.micro, "--query_dataset", world / "posts"]
    flags += ["--gradient_accumulation_steps", job.accumulation, "--save_every", 0, "--output_dir", out / "run"]
    flags += {
        "sft": ["--base_model", world / "base", "--print_samples_every", 0],
        "reward": ["--sft_model_path", world / "base", "--label_dataset", world / "pairs"],
        "ppo": ["--sft_model_path", world / "base", "--reward_model_path", world / "reward", "--print_samples_every", 0]
        + ["--local_rollout_forward_batch_size", job.rollout, "--num_ppo_epochs", 1],
    }[job.stage]
    flags += ["--gradient_checkpointing"] * job.gradient_checkpointing
    command = [sys.executable]
    if job.gpus > 1:
        config = ROOT / "benchmark" / "accelerate" / f"cpu_{job.engine}.yaml"
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
        command += ["--main_process_port", free_port()]
    command = [*map(str, command), __file__, "--worker", job.stage, str(out), *map(str, flags)]
    # Every block above 64 KiB is mapped on its own and unmapped when freed; so are MKL's workspaces.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["HF_DATASETS_CACHE"] = str(out / "cache")
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    notes = [json.loads(path.read_text()) for path in out.glob("rank*.json")]
    if len(notes) != job.gpus:
        raise RuntimeError(f"{job} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return max(notes, key=lambda note: note["peak"] - note["baseline"])


def check_one(number: int, out: Path) -> dict:
    """Predict and measure a set-up of CHECKS; memory in GiB."""
    stage, engine, processes, micro, accumulation, rollout, again = CHECKS[number]
    query, response = SMALL_LENGTHS[stage]
    job = Job(
        str(out / "world" / "base"), stage, engine, "fp32", processes, micro, accumulation, rollout, query, response,
        gradient_checkpointing=again, cpu=True,
    )  # fmt: skip
    started, note = time.time(), measure(job, out / "world", out / f"check{number}")
    row = dict(stage=stage, engine=ENGINES[engine] if processes > 1 else "one process", processes=processes)
    row |= dict(micro=micro, accumulation=accumulation, rollout=rollout, gradient_checkpointing=again)
    with PASSES:  # patches of transformers are not for several threads at once
        row["phases"] = {name: sum(pieces.values()) / GIB for name, pieces in phases(job).items()}
        row["predicted"] = peak(job) / GIB
    row |= {"measured": (note["peak"] - note["baseline"]) / GIB, "baseline": note["baseline"] / GIB}
    row |= {"ratio": row["predicted"] / row["measured"], "seconds": time.time() - started}
    print(check_table([row]).splitlines()[-1], flush=True)
    return row


def check(out: Path, jobs: int) -> list[dict]:
    """Predict and measure every set-up of CHECKS, `jobs` at a time."""
    world = out / "world"
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir(parents=True)
    make_world(world)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda number: check_one(number, out), range(len(CHECKS))))


def check_table(rows: list[dict]) -> str:
    """Predicted and measured peaks, in GiB per process, beyond what the process had before it loaded a model."""
    lines = ["| stage | engine | micro-batch x accumulation | checkpointing | predicted | measured | ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["stage"], row["engine"], f"{row['micro']} x {row['accumulation']}"]
        cells += ["yes" if row["gradient_checkpointing"] else "no", f"{row['predicted']:.2f}", f"{row['measured']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['ratio']:.2f}"]) + " |")
    return "\n".join(lines)


# ---- Command line ----------------------------------------------------------------------------------------------------
def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="print one set-up: 1b, 2.8b, 6.9b, or a folder with a config.json")
    parser.add_argument("--stage", choices=LENGTHS, default="ppo")
    parser.add_argument("--engine", choices=ENGINES, default="zero2", help="ddp on 1 GPU: no engine")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 under ddp is autocast")
    parser.add_argument("--gpus", type=int, default=8, help="processes in all")
    parser.add_argument("--micro", type=int, help="rows per training pass, pairs in reward; default: the paper's PPO's")
    parser.add_argument("--accumulation", type=int, help="training passes per step; default: what makes PPO's 512 rows")
    parser.add_argument("--rollout", type=int, help="rows per generation pass; default: the paper's")
    parser.add_argument("--query", type=int, default=512, help="longest query in tokens")
    parser.add_argument("--response", type=int, help=f"longest response in tokens; default: {LENGTHS}")
    parser.add_argument("--offload", action="store_true", help="frozen models in CPU memory")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--check", action="store_true", help="run the scripts on small models, compare the peaks")
    parser.add_argument("--jobs", type=int, default=1, help="runs of --check at a time; each needs 2 to 4 GiB")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/memory"), help="folder for what --check runs")
    parser.add_argument("--output", type=Path, help="JSON file for the table (and the check)")
    args = parser.parse_args()
    for name in ("gpus", "micro", "accumulation", "rollout", "query", "response", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} is {getattr(args, name)}: it must be greater than 0")
    if args.offload and args.stage != "ppo":
        fail(f"--offload is for PPO: --stage {args.stage} has no frozen models")
    return args


def job_of(args) -> Job:
    """The set-up that the flags describe."""
    micro, rollout, _ = PAPER.get(args.size, PAPER["1b"])
    micro = args.micro or micro
    flags = {name: getattr(args, name) for name in ("size", "stage", "engine", "precision", "gpus", "query")}
    flags |= dict(offload=args.offload, gradient_checkpointing=args.gradient_checkpointing, micro=micro)
    flags |= dict(rollout=args.rollout or rollout, response=args.response or LENGTHS[args.stage])
    return Job(**flags, accumulation=args.accumulation or max(1, 512 // micro // args.gpus))


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3], sys.argv[4:])
    args = parse()
    if args.size:
        print(breakdown(job_of(args)))
        return
    started = time.time()
    record = {"date": str(date.today()), "python": platform.python_version(), "torch": torch.__version__}
    record |= {"command": " ".join(["python", "benchmark/memory.py", *sys.argv[1:]])}
    record |= {"cards, GiB": CARDS, "reserve": RESERVE}
    if args.check:
        record["check"] = check(args.output_dir.resolve(), args.jobs)
        print("\n" + check_table(record["check"]))
        far = [row for row in record["check"] if not 0.85 <= row["ratio"] <= 1.15]
        print(f"{len(record['check']) - len(far)} of {len(record['check'])} within 15%\n")
    record["paper"] = paper_rows()
    print("PPO with the paper's batches, ZeRO-2, bf16: GiB per GPU in each phase; CPU memory in GiB per node")
    print(paper_table(record["paper"]))
    record["seconds"] = time.time() - started
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
