"""The scripts as text: equal copies, tags of the details, sizes, what must not occur, and `--help`."""

import ast
import dataclasses
import inspect
import re
from collections import defaultdict

import pytest
from conftest import ROOT, run_inside

import ppo
import reward
import sft

SCRIPTS = ("sft.py", "reward.py", "ppo.py", "eval_judge.py")
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS}
MODULES = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}
DIFFERENT = {"main", "Args", "train", "evaluate"}  # what each script has of its own under the same name
LONGEST_FUNCTION, LONGEST_SCRIPT = 85, 1780


def definitions(name):
    """Functions and classes on the top level of a script: name -> source, with the comments."""
    tree, lines = ast.parse(SOURCES[name]), SOURCES[name].splitlines()
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_copies_of_a_helper_are_word_for_word_identical():
    copies = defaultdict(dict)
    for name in SCRIPTS:
        for function, source in definitions(name).items():
            copies[function][name] = source
    shared = {function: found for function, found in copies.items() if len(found) > 1 and function not in DIFFERENT}
    for function, found in shared.items():
        assert len(set(found.values())) == 1, f"{function} differs between {', '.join(found)}"
    assert len(shared) > 25  # that there are copies to compare
    assert len(shared["fail"]) == 4 and len(shared["generate"]) == 2


def test_scripts_stand_alone():
    """Nothing of the project is imported: each can be copied out and read by itself."""
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            own = {"sft", "reward", "ppo", "eval_judge", "benchmark"}
            assert not {module.split(".")[0] for module in imported} & own
            assert not (isinstance(node, ast.ImportFrom) and node.level), name


@pytest.mark.parametrize("detail", [*map(str, range(1, 26)), *"TRVLSEKWP"])
def test_every_detail_has_its_tag(detail):
    """`# Detail 7 (...)` in some script, and in none of them twice."""
    counts = {name: len(re.findall(rf"# Detail {detail} \(", source)) for name, source in SOURCES.items()}
    assert max(counts.values()) == 1, counts


def test_tags_are_those_of_known_details():
    for name, source in SOURCES.items():
        for tag in re.findall(r"Details? ([0-9]+|[A-Z])\b", source):
            assert tag in {*map(str, range(1, 26)), *"TRVLSEKWP"}, (name, tag)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_is_long(name):
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, node.name


def test_ppo_can_be_read_in_one_sitting():
    lines = SOURCES["ppo.py"].splitlines()
    assert len(lines) <= LONGEST_SCRIPT
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_must_not_occur(name):
    for word in ("trust_remote_code", "pickle", "TODO", "FIXME", "XXX", "torch.load", "torch.save", "eval(", "exec("):
        found = [line for line in SOURCES[name].splitlines() if word in line and ".eval(" not in line]
        assert not found, found
    assert not [node for node in ast.walk(ast.parse(SOURCES[name])) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_definition_is_used_and_documented(name):
    tree = ast.parse(SOURCES[name])
    for function, source in definitions(name).items():
        assert len(re.findall(rf"\b{function}\b", SOURCES[name])) > 1, f"{function} is never used"
        assert ast.get_docstring(ast.parse(source).body[0]) or function in ("main", "Args", "PolicyAndValue"), function
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                assert (alias.asname or alias.name).split(".")[0] in used, f"{alias.name} is imported and not used"


def field_docs(name):
    """The docstring under each field of Args."""
    (node,) = [node for node in ast.parse(SOURCES[name]).body if getattr(node, "name", "") == "Args"]
    docs = {}
    for field, below in zip(node.body, node.body[1:]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(below, ast.Expr) and isinstance(below.value.value, str), f"{field.target.id} has no text"
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs


@pytest.mark.parametrize("name", MODULES)
def test_help_is_complete(name, monkeypatch):
    """Every field with its whole text and its default."""
    monkeypatch.setenv("COLUMNS", "240")
    done = run_inside(MODULES[name], "--help")
    assert done.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─┃]", " ", re.sub(r"\x1b\[[0-9;]*m", "", done.out)).split())
    docs = field_docs(name)
    fields = dataclasses.fields(MODULES[name].Args)
    assert set(docs) == {field.name for field in fields}
    for field in fields:
        assert f"--{field.name}" in shown, field.name
        assert docs[field.name] in shown, (field.name, docs[field.name])
    assert " ".join(MODULES[name].__doc__.split("\n\n")[0].split()) in shown


def test_defaults_are_the_papers():
    """Details 4, 9, 10, 20: lengths, optimizer and PPO settings, as published."""
    common = {"seed": 44413, "lr": 3e-6, "eps": 1e-5, "warm_up_steps": 0, "max_query_length": 512}
    for module in (sft, reward, ppo):
        assert {name: getattr(module.Args(), name) for name in common} == common
    s, r, p = sft.Args(), reward.Args(), ppo.Args()
    assert (s.max_response_length, s.max_query_response_length, s.num_train_epochs) == (53, 562, 1)
    assert (s.response_length, s.eval_temperature, s.response_loss_only) == (53, 0.01, False)
    assert (r.max_response_length, r.max_query_response_length, r.num_train_epochs) == (169, 638, 1)
    assert (r.max_cnndm_query_length, r.max_cnndm_response_length) == (1919, 155)
    assert r.max_cnndm_query_response_length == 2021 and r.normalization_rows is None
    assert (p.total_episodes, p.num_mini_batches, p.num_ppo_epochs, p.kl_coef) == (1_000_000, 1, 4, 0.05)
    assert (p.gamma, p.lam, p.cliprange, p.cliprange_value, p.vf_coef) == (1.0, 0.95, 0.2, 0.2, 0.1)
    assert (p.temperature, p.response_length, p.missing_eos_penalty, p.whiten_rewards) == (0.7, 53, -1.0, False)
    # On 8 processes the defaults make the paper's batches.
    for args, module in ((s, sft), (r, reward), (p, ppo)):
        batch = args.local_micro_batch_size * args.gradient_accumulation_steps * 8
        assert batch * getattr(args, "num_mini_batches", 1) == module.PAPER_BATCH_SIZE
    assert (sft.PAPER_BATCH_SIZE, reward.PAPER_BATCH_SIZE, ppo.PAPER_BATCH_SIZE) == (128, 64, 512)
    assert "betas=(0.9, 0.999), weight_decay=0.01" in inspect.getsource(ppo.main)


def test_doctests():
    import doctest

    for module in (sft, reward, ppo):
        found = doctest.testmod(module)
        assert found.attempted > 1 and found.failed == 0
