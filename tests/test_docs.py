"""Documents name what exists: files, headings, settings, options, commands, tests; and the README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from longsana.commands import COMMANDS
from longsana.config import leaf_keys, load_config
from longsana.data.prompts import FLAGS
from longsana.inference.flags import OTHER_FLAGS, SETTING_FLAGS
from longsana.training.config import OdePairsConfig, TrainingConfig
from longsana.training.published import TRAINING
from tests.scripts import COMMANDS as BODIES

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
CONFIGS = ROOT / "configs/sana_video_config/longsana/480ms"
FOLDERS = "longsana|tests|docs|configs|asset|train_video_scripts|inference_video_scripts"
SETTINGS = {*leaf_keys(TrainingConfig), *leaf_keys(OdePairsConfig), *TRAINING.rules, *TRAINING.references}
MESSAGES = {
    name
    for file in ("protocol", "live")
    for name in re.findall(r'"(video\.\w+)"', (ROOT / f"longsana/serving/{file}.py").read_text(encoding="utf-8"))
}
"""Messages of live sessions that are called as settings might be."""
SECTIONS = "|".join(sorted({name.partition(".")[0] for name in SETTINGS if "." in name}))
STARTS = ("python", "accelerate", "torchrun", "longsana")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def inline(text: str) -> list[str]:
    """What stands between single backticks, outside of blocks, on one line each."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", outside)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each Python command in the shell blocks, folded lines joined, without what is set before it."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words and words[0] in STARTS:
                    yield words


def script_of(words: list[str]) -> Path:
    """The file whose text a command runs: a script, the module after -m, or that of `longsana NAME`."""
    if words[0] == "longsana":
        return ROOT / (COMMANDS[words[1]][0].replace(".", "/") + ".py")
    if "-m" in words[:2]:
        return ROOT / (words[2].replace(".", "/") + ".py")
    script = ROOT / next(word for word in words[1:] if word.endswith(".py"))
    return ROOT / "longsana/commands" / f"{BODIES[script.stem]}.py" if script.stem in BODIES else script


def options_of(script: Path) -> set[str]:
    """Names of a script's options: its own, `--threads`, and the settings and short flags where it takes these."""
    source = script.read_text(encoding="utf-8")
    options = set(re.findall(r'"--([a-z][\w-]*)"', source)) | ({"threads"} if "add_threads" in source else set())
    if "parse_flags(" in source:
        return {*options, *SETTING_FLAGS, *OTHER_FLAGS, *SETTINGS, "json_file", "custom_height_width"}
    if "parse_command(" in source:
        return {*options, *SETTINGS, *re.findall(r'"(\w+)": "\w+\.\w+"', source)}
    return options


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def all_options() -> set[str]:
    commands = [*ROOT.glob("longsana/commands/*.py"), *ROOT.glob("*_scripts/*.py"), ROOT / "longsana/convert.py"]
    scripts = [*commands, *ROOT.glob("tests/full_size/*.py")]
    return set().union(FLAGS, ["help"], *map(options_of, scripts))


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


@each_document
def test_paths_and_tests_that_are_named_exist(document: Path) -> None:
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    text = document.read_text(encoding="utf-8")
    for code in inline(text):
        for path in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w", code):
            assert (ROOT / path).exists(), path
        for name in re.findall(r"^test_\w+$", code):
            assert f"def {name}(" in there, name
        for target in re.findall(r"^make ([\w-]+)", code):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
    for words in commands(text):
        for path in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w", " ".join(words)):
            assert (ROOT / path).exists() or "shapes/parts" in path, path


@each_document
def test_settings_that_are_named_exist(document: Path) -> None:
    codes = inline(document.read_text(encoding="utf-8"))
    named = {name for code in codes for name in re.findall(rf"(?<![\w./])(?:{SECTIONS})(?:\.[a-z]\w*)+", code)}
    files = {name for name in named if name.rpartition(".")[2] in ("pth", "pt", "py", "json", "yaml", "safetensors")}
    assert named - files <= SETTINGS | MESSAGES, named - files - SETTINGS - MESSAGES
    for setting in {found for code in codes for found in re.findall(rf"^((?:{SECTIONS})\.\w+=\S+)$", code)}:
        pairs = setting.startswith("pairs.")
        schema = OdePairsConfig if pairs else TrainingConfig
        load_config(CONFIGS / ("ode_pairs.yaml" if pairs else "longsana.yaml"), [setting], schema)


@each_document
def test_options_that_are_named_exist(document: Path) -> None:
    text, known = document.read_text(encoding="utf-8"), all_options()
    for code in inline(text):
        for name in re.findall(r"^--([\w.-]+)", code):
            assert name in known, code
    for words in commands(text):
        if words == ["python"]:
            continue
        script = script_of(words)
        assert script.is_file(), words
        place = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("longsana"))
        place += words[0] == "longsana"
        for word in words[place + 1 :]:
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in options_of(script), word
            elif re.fullmatch(rf"(?:{SECTIONS})\.\w+=.*", word):
                assert word.partition("=")[0] in SETTINGS, word


def test_sections_that_the_code_cites_exist() -> None:
    headings = re.findall(r"^##+ ([0-9](?:\.[0-9]+)?)", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    sources = [path for folder in ("longsana", "tests") for path in (ROOT / folder).rglob("*.py")]
    cited = {
        (path.name, number)
        for path in sources
        for group in re.findall(r"method\.md ([0-9.]+(?:(?:,| and| to) [0-9.]+)*)", path.read_text())
        for number in re.findall(r"[0-9](?:\.[0-9]+)?", group)
    }
    assert len(cited) > 20
    assert {(name, number) for name, number in cited if number not in headings} == set()


def test_planted_faults_are_seen() -> None:
    """The patterns above find what they are for."""
    text = "see `model.no_such` and `longsana/none.py`, then\n```bash\nA=b python \\\n  x.py --no # python\n```\n"
    assert inline(text) == ["model.no_such", "longsana/none.py"]
    assert list(commands(text)) == [["python", "x.py", "--no"]]
    assert "model.no_such" not in SETTINGS and "no" not in all_options()
    assert slug("3.2 The shifted table: it's") == "32-the-shifted-table-its"


def test_what_is_to_be_installed_works_from_a_checkout() -> None:
    """The package is on no index: every line installs the checkout, with extras that it has."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    sources = [path for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")]
    told = re.compile(r"pip install .*?'(?P<what>[^']*)\[(?P<extras>[\w,{}]+)\]'")
    found = [match for path in [*sources, *DOCUMENTS] for match in told.finditer(path.read_text(encoding="utf-8"))]
    assert {match["extras"] for match in found} >= {"lora", "plot", "serve"}
    for match in found:
        assert match["what"] == ".", match[0]
        assert match["extras"] == "{extra}" or set(match["extras"].split(",")) <= extras, match[0]


def test_the_readme_is_short_and_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.encode()) <= 11_000
    assert {path.relative_to(ROOT).as_posix() for path in PAGES} <= set(re.findall(r"\]\((docs/\w+\.md)", text))


def test_what_a_server_takes_and_says_is_in_its_page() -> None:
    text = "".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("live", "serving"))
    sources = [(ROOT / f"longsana/commands/{name}.py").read_text(encoding="utf-8") for name in ("serve", "load")]
    own = [flag for source in sources for flag in re.findall(r'add_argument\(\s*"(--\w+)"', source)]
    said = re.findall(r'_message\(\s*"([\w.]+)"', (ROOT / "longsana/serving/live.py").read_text(encoding="utf-8"))
    assert len(own) > 5 and {flag for flag in own if flag not in text} <= {"--config"}
    assert len(said) > 8 and {message for message in said if message not in text} == set()


def test_every_setting_of_a_video_is_in_a_page() -> None:
    """Those of the past too, and the recipe's other world."""
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    section = {name for name in leaf_keys(TrainingConfig) if name.startswith(("sampling.", "vae.", "video."))}
    section |= {"model.state_decay", "model.num_sink_blocks", "model.num_cached_blocks"}
    assert {name for name in section if name not in text} == set()
    assert "--world remembered_shapes" in text
