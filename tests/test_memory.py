"""Tests of benchmark/memory.py: what it counts against published numbers, closed forms, and real tensors on the CPU."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, GPTNeoXConfig

spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmark" / "memory.py")
memory = importlib.util.module_from_spec(spec)
sys.modules["memory"] = memory  # its dataclass looks itself up there
spec.loader.exec_module(memory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config of a small model, as it is all that is needed."""
    path = tmp_path_factory.mktemp("small")
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, vocab_size=500)
    GPTNeoXConfig(**sizes, max_position_embeddings=128, tie_word_embeddings=False).save_pretrained(path)
    return str(path)


def small_job(folder, stage="ppo", **more):
    return memory.Job(folder, stage, **dict(micro=2, accumulation=2, rollout=4, query=20, response=8) | more)


@pytest.mark.parametrize("size, number", [("1b", 1_011_781_632), ("2.8b", 2_775_208_960), ("6.9b", 6_857_302_016)])
def test_parameters_are_the_published_ones(size, number):
    language, scalar = memory.parameter_sizes(size)
    hidden, vocabulary = memory.SIZES[size][0], memory.SIZES[size][-1]
    assert sum(language) == number
    assert sum(scalar) == number - vocabulary * hidden + hidden + 1  # another head, with a bias


def test_optimizer_and_gradients_have_closed_forms(folder):
    trained = sum(memory.trained_sizes(small_job(folder)))
    language, scalar = map(sum, memory.parameter_sizes(folder))
    assert trained == language + scalar
    plain = memory.phases(small_job(folder, engine="ddp", precision="fp32", gpus=1))["step"]
    assert plain["parameters"] == plain["gradients"] == plain["frozen models"] == 4 * trained
    assert plain["optimizer states"] == 8 * trained and "engine" not in plain
    ddp = memory.phases(small_job(folder, engine="ddp", gpus=4))["step"]
    assert ddp["engine"] == 4 * trained and ddp["optimizer states"] == 8 * trained  # nothing is shared
    zero2 = memory.phases(small_job(folder, gpus=4))["train"]
    assert zero2["parameters"] == zero2["frozen models"] == 2 * trained
    assert zero2["optimizer states"] == 12 * -(-trained // 4)
    assert 2 * trained / 4 <= zero2["gradients"] <= 2 * trained
    zero3 = memory.phases(small_job(folder, engine="zero3", gpus=4))["step"]
    assert zero3["parameters"] == zero3["gradients"] == 2 * -(-trained // 4)


def test_a_process_owns_the_gradients_that_touch_its_partition(folder, monkeypatch):
    monkeypatch.setattr(memory, "trained_sizes", lambda job: (3, 6, 3))  # partitions of 6: the second has two processes
    assert memory.owned_elements(small_job(folder, gpus=2)) == 9
    assert memory.owned_elements(small_job(folder, gpus=1)) == 12


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cache_is_as_large_as_a_real_one(folder, precision):
    rows, query, response = 3, 20, 8
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(memory.load_config(folder), dtype=dtype)
    with torch.no_grad():  # the last token that is sampled is not fed
        cache = model(torch.zeros((rows, query + response - 1), dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    predicted = memory.generation(folder, "zero2", precision, rows, query, response)["cache"]
    assert predicted == real == 2 * 3 * rows * (query + response - 1) * 64 * dtype.itemsize


SET_UPS = [("sft", "ddp", "fp32"), ("reward", "zero2", "bf16"), ("ppo", "zero2", "bf16"), ("ppo", "ddp", "bf16")]


@pytest.mark.parametrize("stage, engine, precision", SET_UPS)
def test_autograd_keeps_what_the_real_pass_keeps(folder, stage, engine, precision):
    """The saved tensors of a real forward pass on the CPU: as many bytes as without memory, parameters left out."""
    job = small_job(folder, stage, engine=engine, precision=precision)

    def saved():
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        dtype = torch.bfloat16 if job.width == 2 else torch.float32
        model = memory.build(folder, dtype).eval()
        head = torch.nn.Linear(64, 1, dtype=dtype)
        known = {t.untyped_storage()._cdata for t in [*model.parameters(), *head.parameters(), *model.buffers()]}
        ledger = memory.Ledger([*model.parameters(), *head.parameters(), *model.buffers()])
        with ledger, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), memory.autocast(job):
            loss = memory.training_loss(job, model, head)
        held = ledger.live
        del loss
        return sum(s.nbytes() for key, s in storages.items() if key not in known), held

    real, real_held = saved()
    with memory.fake_models(mask=False):
        fake, fake_held = saved()
    assert fake == real
    assert fake_held == real_held
    made = memory.training_pass(job)
    assert made["activations"] + made["logits"] == fake_held
    assert fake <= fake_held <= 1.05 * fake  # what lives without being saved is small


def test_the_ledger_counts_real_tensors():
    with memory.Ledger() as ledger:
        a = torch.zeros(1000)
        b = a[:500] + 1
        assert (ledger.live, ledger.peak) == (6000, 6000)
        del a
        assert (ledger.live, ledger.peak) == (2000, 6000)
        b.add_(1)
        assert ledger.live == 2000


def test_more_rows_need_more_and_remedies_less(folder):
    peaks = [memory.peak(small_job(folder, micro=micro, rollout=4 * micro)) for micro in (1, 2, 4, 8)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    made = [memory.training_pass(small_job(folder, micro=micro))["activations"] for micro in (1, 2, 4)]
    assert made[0] < made[1] < made[2]
    job = small_job(folder, micro=8)
    again = memory.training_pass(replace(job, gradient_checkpointing=True))
    assert again["activations"] < made[2]
    fewer = [memory.phases(replace(job, gpus=gpus))["train"]["optimizer states"] for gpus in (1, 2, 4, 8)]
    assert fewer == sorted(fewer, reverse=True)
    assert memory.phases(replace(job, offload=True))["generate"]["frozen models"] == 0
    assert memory.host_memory(job)[0] == 4 * 2 * sum(memory.trained_sizes(job)) * 8


def test_one_set_up_is_printed(folder, monkeypatch, capsys):
    flags = ["--size", folder, "--stage", "sft", "--gpus", "2", "--micro", "2"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *flags])
    memory.main()
    out = capsys.readouterr().out
    assert "activations" in out and "fits a GPU of 80 GB" in out


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--size", "13b"], "--size 13b"),
        (["--size", "1b", "--micro", "0"], "--micro is 0"),
        (["--size", "1b", "--gpus", "-1"], "--gpus is -1"),
        (["--size", "1b", "--stage", "sft", "--offload"], "--offload is for PPO"),
    ],
)
def test_bad_input_ends_in_one_line(flags, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", *flags])
    with pytest.raises(SystemExit) as stop:
        memory.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert name in error and error.startswith("error: ") and error.count("\n") == 1
