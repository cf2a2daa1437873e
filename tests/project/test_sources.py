"""The sources as text: what the scripts share is equal, and what must not stand in any file of the project."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("sft.py", "reward.py", "ppo.py")
OWN = ("Args", "main", "train", "evaluate")  # what each script has of its own under a name that others use too
PYTHON = [ROOT / name for name in (*SCRIPTS, "eval_judge.py")] + sorted((ROOT / "benchmark").rglob("*.py"))
PYTHON = [path for path in PYTHON if "peers" not in path.parts]  # which have an environment of their own
# Hosts that files may name, beside those that are made up for a test.
HOSTS = {"arxiv.org", "api.openai.com", "huggingface.co", "github.com", "127.0.0.1", "localhost"}


def project_files():
    """The files that git tracks, and those that it will."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("git does not know this folder")
    paths = [ROOT / line for line in done.stdout.splitlines()]
    return [path for path in paths if path.is_file() and path.suffix != ".png"]


def test_what_the_scripts_share_is_equal_word_for_word():
    """Functions and classes, with decorators and comments."""
    copies = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                copies.setdefault(node.name, []).append(text.splitlines()[first - 1 : node.end_lineno])
    shared = {name: found for name, found in copies.items() if len(found) > 1}
    assert {"read_rows", "load_model", "save_checkpoint", "open_run", "sample_responses", "fail"} <= shared.keys()
    for name, found in shared.items():
        assert all(lines == found[0] for lines in found), f"{name} is not the same everywhere"


def test_imports_are_in_the_requirements():
    """Or in the standard library; only benchmark/ imports from the project itself."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    packages = packages_distributions()
    for path in PYTHON:
        own = {"benchmark", "ppo", "eval_judge"} if "benchmark" in path.parts else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - own:
                known = {name.lower().replace("_", "-") for name in packages.get(module, [])}
                assert known & required, f"{path} imports {module}"


def test_no_code_of_others_runs():
    """No code from a model folder, and no weights that are unpickled."""
    for path in project_files():
        if path.suffix == ".py" and "tests" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"trust_remote_code\s*=\s*(?!False)", text), path
            assert not re.search(r"torch\.load|torch\.save|\bpickle\b", text), path
            calls = re.findall(r"(?:AutoConfig|AutoTokenizer|AutoModel\w*)\.from_pretrained\([^)]*\)", text)
            assert all("trust_remote_code=False" in call or "**" in call for call in calls), (path, calls)


def test_no_places_of_one_machine():
    for path in project_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"(?<![\w./~$}])/(?:work|home|root|mnt|Users)/\w+", text)
        hosts = set(re.findall(r"https?://([A-Za-z0-9.-]+[A-Za-z0-9])", text)) - HOSTS
        assert not found and (not hosts or "tests" in path.parts), (path, found, hosts)
