"""The Megatron-LM patches: what they change, apply.sh on small trees, and the tags of a real repository.

Set MEGATRON_LM_REPO to a git clone of Megatron-LM to check every patch against the commit that it names, and tags.
"""
import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from moba_megatron import megatron_lm

PATCHES = Path(__file__).parents[2] / "patches"
LINES = ["0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19", "main"]
TAGS = {"0.13": ["core_v0.13.0", "core_v0.13.1"], "0.14": ["core_v0.14.0"], "0.15": ["core_v0.15.0", "core_v0.15.3"],
        "0.16": ["core_v0.16.0", "core_v0.16.1"], "0.17": ["core_v0.17.0", "core_v0.17.1"],
        "0.18": ["core_v0.18.0", "core_v0.18.2"], "0.19": ["core_v0.19.0"], "main": []}


def patch_of(line):
    return PATCHES / f"megatron-lm-{line}.patch"


def changed_files(line):
    return re.findall(r"^\+\+\+ b/(.*)$", patch_of(line).read_text(), re.M)


def before(line):
    """What a patch expects to find: of each file its context and removed lines, on the line numbers that it gives."""
    files, lines = {}, []
    for text in patch_of(line).read_text().splitlines():
        if text.startswith("+++ b/"):
            lines = files.setdefault(text[6:], [])
        elif match := re.match(r"@@ -(\d+)", text):
            lines.extend(f"filler = {n}" for n in range(len(lines) + 1, int(match[1])))
        elif text[:1] in (" ", "-") and not text.startswith("---"):
            lines.append(text[1:])
    return {name: "\n".join(lines) + "\n" for name, lines in files.items()}


@pytest.fixture
def checkout(tmp_path):
    """A tree that has what the 0.19 patch expects, and a version."""
    return make_checkout(tmp_path / "Megatron-LM", "0.19")


def make_checkout(root, line, version=None):
    for name, text in before(line).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    major, minor = (version or line).split(".")
    version = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = 0\nPRE_RELEASE = ''\n"
    (root / "megatron/core/package_info.py").write_text(version)
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*.py"))}


def apply(*arguments):
    return subprocess.run(["bash", str(PATCHES / "apply.sh"), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("line", LINES)
def test_patch_calls_what_the_package_has(line):
    lines = patch_of(line).read_text().splitlines()
    added = [text[1:] for text in lines if text.startswith("+") and text[:3] != "+++"]
    names = {name.strip() for text in added if text.startswith("from moba_megatron.megatron_lm import ")
             for name in text.split("import ")[1].split(",")}
    assert names == {"moba_arguments", "core_attention_for", "moba_hybrid_stack", "moba_flops", "moba_model_check"}
    assert all(callable(getattr(megatron_lm, name)) for name in names)
    assert len(added) <= 12 and len(changed_files(line)) == 5


def test_apply_and_revert(checkout):
    original = contents(checkout)
    assert "not applied, and fits" in apply("--check", checkout).stdout
    done = apply("--dry-run", checkout)
    assert "would apply patches/megatron-lm-0.19.patch" in done.stdout
    assert "    megatron/training/arguments.py\n" in done.stdout
    assert contents(checkout) == original

    assert apply(checkout).returncode == 0
    patched = contents(checkout)
    assert {name for name in patched if patched[name] != original[name]} == set(changed_files("0.19"))
    assert "nothing to do" in apply(checkout).stdout and contents(checkout) == patched
    assert "is applied" in apply("--check", checkout).stdout

    assert "would revert" in apply("--revert", "--dry-run", checkout).stdout and contents(checkout) == patched
    assert apply("--revert", checkout).returncode == 0
    assert contents(checkout) == original
    assert "nothing to do" in apply("--revert", checkout).stdout


def test_apply_inside_another_repository(checkout):
    subprocess.run(["git", "init", "-q", str(checkout.parent)], check=True)
    assert apply(checkout).returncode == 0
    assert "core_attention_for" in (checkout / "megatron/core/models/backends.py").read_text()


@pytest.mark.parametrize("line", LINES)
def test_apply_picks_the_patch_by_version(tmp_path, line):
    root = make_checkout(tmp_path, line, "0.20" if line == "main" else line)
    assert f"megatron-lm-{line}.patch is not applied, and fits" in apply("--check", root).stdout


def test_apply_warns_of_an_unknown_version(tmp_path):
    done = apply("--check", make_checkout(tmp_path, "main", "0.42"))
    assert done.returncode == 0 and "0.42 is not a version that was checked" in done.stderr


def test_apply_refuses(tmp_path, checkout):
    assert apply().returncode == 2
    assert "unknown option --force" in apply("--force", checkout).stderr
    assert "no Megatron-LM checkout" in apply(tmp_path).stderr
    (checkout / "megatron/training/training.py").write_text("import another\n")
    done = apply(checkout)
    assert done.returncode == 1 and "does not fit" in done.stdout and "python -m moba_megatron.launch" in done.stderr
    assert "moba" not in "".join(contents(checkout).values())


@pytest.mark.skipif("MEGATRON_LM_REPO" not in os.environ, reason="set MEGATRON_LM_REPO to a git clone of Megatron-LM")
@pytest.mark.parametrize("line", LINES)
def test_patch_applies_to_megatron_lm(tmp_path, line):
    repository = os.environ["MEGATRON_LM_REPO"]

    def git(*arguments):
        return subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True).stdout

    commit = re.search(r"commit ([0-9a-f]{40})", patch_of(line).read_text())[1]
    for number, revision in enumerate([commit, *TAGS[line]]):
        root = tmp_path / str(number)
        for name in [*changed_files(line), "megatron/core/package_info.py"]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(git("show", f"{revision}:{name}"))
        check = subprocess.run(["git", "apply", "--check", str(patch_of(line))], cwd=root, capture_output=True,
                               text=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)})
        assert check.returncode == 0, f"{revision}: {check.stderr}"
        done = apply(root)
        assert done.returncode == 0 and patch_of(line).name in done.stdout, f"{revision}: {done.stdout}{done.stderr}"
        for name in changed_files(line):
            ast.parse((root / name).read_text())
        providers = (root / "megatron/core/models/backends.py").read_text()
        assert re.search(r"class LocalSpecProvider.*return core_attention_for\(DotProductAttention\)", providers, re.S)
