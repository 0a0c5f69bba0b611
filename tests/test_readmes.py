"""Every README: its snippets run as printed, its commands know their options, its links and paths lead somewhere."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex

import pytest
import yaml
from training_utils import REPOSITORY

from anygpt.commands import COMMANDS
from anygpt.commands import main as anygpt
from anygpt.data.schema import MediaRoot, parse_sample
from anygpt.parts.source import Source

DOCUMENTS = sorted(
    path
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob(".github/*.md"), *REPOSITORY.glob("[acs]*/**/README.md")]
    if "weights" not in path.parts
)
NAMES = [str(path.relative_to(REPOSITORY)) for path in DOCUMENTS]
README = (REPOSITORY / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_is_short():
    assert README.count("\n") <= 200


def test_python_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(README, "python")
    exec(compile(snippet, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "encoder_llm/nll" in said and "PIL.Image" in said
    assert (tmp_path / "runs/mine/config.json").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_rows_and_parts_are_valid(document, tmp_path):
    for block in blocks(document.read_text(), "json"):
        sample = parse_sample(json.loads(block), "README", "0", MediaRoot(tmp_path))
        assert sample.messages[0].role == "user"
    known = set(Source.__dataclass_fields__) | {"projector", "modality", "num_signal_tokens", "signal"}
    for block in blocks(document.read_text(), "yaml"):
        model = yaml.safe_load(block).get("model", {})
        parts = [*model.get("encoders", {}).values(), *model.get("decoders", {}).values()]
        for part in [*parts, *filter(None, [model.get("language_model")])]:
            assert set(part) <= known, part


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_and_paths_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:anygpt|configs|scripts|stages|tests)/[^\s`…*{<]+)`", text):
        assert (REPOSITORY / path).exists(), path


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every command line in a block of bash or console."""
    found = []
    for name, document in zip(NAMES, DOCUMENTS, strict=True):
        text = document.read_text().replace("\\\n", " ")
        lines = "\n".join(blocks(text, "bash")).splitlines()
        lines += [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            if words and words[0] in ("anygpt", "python", "accelerate"):
                found.append((name, words))
    return found


@pytest.mark.parametrize(("document", "words"), commands(), ids=[" ".join(words)[:60] for _, words in commands()])
def test_commands_know_their_options(document, words):
    """The script is there, and its `--help` names each option that is printed."""
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "accelerate":
        script = next(word for word in words if word.endswith(".py"))
        config = words[words.index("--config_file") + 1] if "--config_file" in words else None
        assert config is None or (REPOSITORY / config).is_file()
        options -= {"--config_file"}
    elif words[:2] == ["python", "-m"]:
        assert (REPOSITORY / words[2].replace(".", "/")).is_dir() or (
            REPOSITORY / f"{words[2].replace('.', '/')}.py"
        ).is_file()
        return
    else:
        script = words[1]
    if words[0] == "anygpt":
        assert script in COMMANDS
        stem = script
    else:
        assert (REPOSITORY / script).is_file()
        stem = script.removeprefix("scripts/").removesuffix(".py").replace("_", "-")
    if stem in COMMANDS and options:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            anygpt([stem, *[w for w in words[2:3] if stem == "benchmark"], "--help"])
        for option in options - {"--help"}:
            assert option in said.getvalue() or option.startswith("--data."), option
