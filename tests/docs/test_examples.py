"""What the pages say is so: their Python runs, their commands exist, their links lead somewhere."""

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import nblora
from nblora.cli import main
from tests.text.folders import chat_file, sentence_folder

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODELS = {"encoder": "bert_cls_qv", "llama": "llama_clm_all"}
"""Folders of models that pages load, and the tiny ones that stand for them."""
MADE = {
    "text.md": {"minilm": sentence_folder, "smollm2.gguf": chat_file},
    "finetuning.md": {"minilm": sentence_folder},
    "classifying.md": {"minilm": sentence_folder},
}
"""Those that have to be made."""
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    """Pairs of first line's number and text."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] in languages:
            yield text.count("\n", 0, found.start(2)) + 1, found[2]


def with_blocks(*languages):
    return [page for page in PAGES if any(True for _ in blocks(page, *languages))]


def commands(page):
    """Every call of nblora in a page's shell blocks, as lists of words."""
    for _, text in blocks(page, "sh", "bash", "console"):
        for line in text.splitlines():
            for part in re.split(r"&&|;", line.removeprefix("$ ")):
                words = shlex.split(part)
                if words and Path(words[0]).name == "nblora":
                    yield words[1:]


def test_the_pages_are_found():
    names = {page_id(page) for page in PAGES}
    wanted = {"quickstart", "mathematics", "architecture", "training", "files"}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}.md" for name in wanted)} <= names


@pytest.mark.parametrize("page", with_blocks("python"), ids=page_id)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, case in MODELS.items():
        shutil.copytree(ROOT / "tests" / "data" / "models" / case / "base", tmp_path / name)
    for name, make in MADE.get(page.name, {}).items():
        make(tmp_path / name)
    namespace = {"__name__": "page"}
    for line, text in blocks(page, "python"):
        code = compile("\n" * (line - 1) + text, str(page), "exec")  # a failure names the page's own line
        exec(code, namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=page_id)
def test_the_commands_of_a_page_exist_with_their_options(page):
    for words in commands(page):
        command = main.get_command(None, words[0])
        assert command is not None, f"{page_id(page)}: no command {words[0]!r}"
        known = {name for parameter in command.params for name in parameter.opts}
        for option in (word.split("=")[0] for word in words if word.startswith("-")):
            assert option in known, f"{page_id(page)}: nblora {words[0]} has no option {option}"
        result = CliRunner().invoke(main, [words[0], "--help"])
        assert result.exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_links_of_a_page_lead_to_files(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page_id(page)} links to {target}, which is not there"


def test_every_function_that_mathematics_names_is_there():
    text = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(nblora\.[\w.]+)`", text))
    assert len(names) >= 5
    for name in names:
        assert callable(pkgutil.resolve_name(name)), f"docs/mathematics.md names {name}, which is not callable"


def test_every_operation_that_mathematics_names_is_the_backends():
    from nblora.backends.blocks import ReferenceBlocks
    from nblora.backends.protocol import Backend

    text = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    table = [line.split("|") for line in text.splitlines() if line.count("|") == 5]
    operations = {name for cells in table[2:] for name in re.findall(r"`(\w+)`", cells[3])}
    assert {"forward", "backward_update", "merge"} <= operations
    for name in operations:
        assert callable(getattr(Backend, name, getattr(ReferenceBlocks, name, None))), (
            f"docs/mathematics.md names {name}, which no backend offers"
        )


def test_every_room_of_the_tree_is_in_architecture_and_the_other_way_round():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, re.MULTILINE))
    found = {module.name for module in pkgutil.iter_modules(nblora.__path__) if not module.name.startswith("_")}
    assert named == found


def test_the_readme_has_a_table_of_results_and_says_which_machine():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = text.index("<!-- demo results"), text.index("<!-- end of demo results")
    table = text[begin:end]
    for method in ("Not adapted", "Head only", "LoRA", "Delta-LoRA", "Full"):
        assert re.search(rf"^\| {method} \|.*±", table, re.MULTILINE), f"no row for {method}"
    assert "Measured on" in table


def test_the_readme_says_what_the_delta_is_and_is_not():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "not the Delta-LoRA of [Zi et al. (2023)]" in text
    assert "more parameters than the base" in text.replace("\n", " ")


def test_update_readme_puts_a_table_between_the_marks(tmp_path):
    copy = tmp_path / "docs" / "update_readme.py"
    copy.parent.mkdir()
    copy.write_text((ROOT / "docs" / "update_readme.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "results.md").write_text("| a new table |\n", encoding="utf-8")
    for _ in range(2):  # a second run changes nothing more
        subprocess.run([sys.executable, copy, tmp_path / "results.md"], check=True, env=dict(os.environ))
        written = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert written.count("| a new table |") == 1
        assert "| Full |" not in written
        assert written.startswith("# nblora\n")
        assert written.endswith("Apache License 2.0.\n")


def test_the_first_screen_says_who_should_take_something_else():
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25])
    assert "**Take nblora** where" in first
    assert "**Take [PEFT]" in first


def test_no_figure_of_a_busy_machine_is_shown_to_users():
    assert "do not hold" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_user_pages_speak_of_tasks():
    """And not of how the source tree is furnished; its pages for contributors may."""
    for page in ("quickstart", "training", "formats", "merge", "estimators", "sweeps", "plots", "files", "finetuning"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert not re.search(r"\b(rooms?|doors?|crews?|registers?)\b", text.replace("room for", "")), page
