"""The rules of the house: what imports what, how long things are, and that the documents speak of what is there."""

import ast
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from umbif import cli
from umbif.corpus.phantom_lesions import STRENGTHS
from umbif.corpus.readers import UNREADABLE
from umbif.recipe.check import check
from umbif.recipe.compose import compose

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "umbif"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FLOW = ("pages", "corpus", "stream", "encoders", "pretrain", "downstream", "evaluation", "deploy")
FOR_ALL = ("errors", "files", "machine", "progress", "quiet", "ranges", "__version__")
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
RECIPES = sorted(
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "_parts" not in path.parts
)
WRITTEN_BY_US = ("umbif", "recipes", "slurm", "tests", "docs", "benchmarks", ".ci")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|tmp|root|home|opt|Users)/")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


# ---------------------------------------------------------------- imports


def part_of(name: str) -> str:
    """The part of the house that a file or a module belongs to: `stream`, or its own name at the top."""
    return re.split(r"[/.]", name.removeprefix("umbif."))[0]


def imported(tree: ast.AST) -> set[str]:
    """Every name of the package that a file imports, also inside its functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("umbif.")}


def forbidden(file: str, names: set[str]) -> list[str]:
    """What a file imports and must not."""
    part = part_of(file)
    left = FLOW[: FLOW.index(part) + 1] if part in FLOW else ()
    wrong = []
    for name in sorted(names):
        target = part_of(name)
        if target in FOR_ALL or target == part:
            continue
        if (
            (target == "cli" and file != "__main__.py")
            or (target == "scale" and part not in ("fit", "agreement"))
            or part == "scale"
            or (part in FLOW and target not in left)
        ):
            wrong.append(f"{file} imports {name}")
    return wrong


def test_imports_flow_one_way():
    wrong = []
    for file in SOURCES:
        wrong += forbidden(file, imported(ast.parse((PACKAGE / file).read_text())))
    assert wrong == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("corpus/readers.py", "from umbif.stream.exams import Exams"),
        ("stream/order.py", "from umbif.downstream import tasks"),
        ("evaluation/report.py", "def f():\n    import umbif.fit"),
        ("demo.py", "from umbif.cli import main"),
        ("pretrain/umbif.py", "from umbif.scale import checkpoint"),
        ("scale/metrics_csv.py", "from umbif.corpus.shards import Corpus"),
        ("pages/page.py", "from umbif import recipe"),
    ],
)
def test_the_rule_of_imports_sees_what_breaks_it(file, line):
    assert len(forbidden(file, imported(ast.parse(line)))) == 1


# ---------------------------------------------------------------- length


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function, its docstring not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_text = ast.get_docstring(node, clean=False) is not None
            text = (first.end_lineno or 0) - first.lineno + 1 if has_text else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - text


def test_no_file_and_no_function_is_long():
    long = []
    for file in SOURCES:
        source = (PACKAGE / file).read_text()
        if (length := len(source.splitlines())) > MAX_LINES:
            long.append(f"{file}: {length} lines")
        long += [f"{file}: {name} has {n} lines" for name, n in functions(ast.parse(source)) if n > MAX_FUNCTION_LINES]
    assert long == []


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_has_no_problem(name):
    recipe = compose(name)
    assert [str(problem) for problem in check(recipe)] == []
    assert recipe.about["summary"]


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        (recipe, f"{group}={path.stem}")
        for recipe, groups in (("pretrain/umbif_tiny", "hardware strategy tracker"), ("finetune/idh", "encoder"))
        for group in groups.split()
        for path in sorted((ROOT / "recipes/_parts" / group).glob("*.yaml"))
    ],
)
def test_every_part_fits_a_recipe(recipe, part):
    composed = compose(recipe, [part])
    assert [str(problem) for problem in check(composed)] == []
    assert f"_parts/{part.replace('=', '/')}.yaml" in composed.origins.values()


# ---------------------------------------------------------------- command line


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['umbif', '--help']\nfrom umbif.cli import main\ntry:\n    main()\n"
        "finally:\n    print('HEAVY', sorted({'torch', 'lightning', 'monai', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_shows_examples_that_parse(verb):
    epilog = COMMANDS[verb].epilog or ""
    examples = [line.strip() for line in epilog.splitlines() if line.strip().startswith("umbif ")]
    assert "Examples" in epilog
    assert examples
    assert all(line.split()[1] == verb or line.split()[1] in COMMANDS for line in examples)
    for line in examples:
        parse(re.split(r"\s{3,}", line)[0])  # a remark stands some blanks to the right


def parse(line: str) -> None:
    """Has click parse a command as a shell would give it, without running it; raises if it does not fit."""
    _, verb, *words = shlex.split(line, comments=True)
    assert verb in COMMANDS, f"no such verb: {line}"
    with COMMANDS[verb].make_context(verb, words):
        pass


@pytest.mark.parametrize("line", ["umbif fitt x", "umbif index data --label t.csv", "umbif cp pretrain/umbif_tiny"])
def test_a_command_that_does_not_exist_is_seen(line):
    with pytest.raises(Exception, match=r"no such verb|No such option|[Mm]issing (argument|parameter)"):
        parse(line)


# ---------------------------------------------------------------- documents


def test_architecture_names_every_file_once_and_no_other():
    text = (ROOT / "docs/architecture.md").read_text()
    block = text.split("## The files")[1].split("\n## ")[0]
    named = re.findall(r"^\| `([^`]+\.py)` \|", block, flags=re.MULTILINE)
    assert sorted(named) == [file for file in SOURCES if (PACKAGE / file).stat().st_size]


def code_lines(document: Path) -> list[str]:
    """The lines of the code blocks of a Markdown file, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_exist(document):
    lines = code_lines(document)
    for line in lines:
        if line.startswith("umbif "):
            parse(line)
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    names = {name for line in lines for name in re.findall(r"\b(?:prepare|pretrain|finetune|demo)/\w+", line)}
    assert names <= set(RECIPES)


def test_recipes_of_the_readme_compose_with_their_overrides():
    fits = [line for line in code_lines(ROOT / "README.md") if line.startswith("umbif fit ")]
    assert fits
    for name, *overrides in (shlex.split(line, comments=True)[2:] for line in fits):
        if name in RECIPES:
            assert [str(problem) for problem in check(compose(name, overrides))] == []


def test_links_between_documents_lead_somewhere():
    dead = [
        f"{document.name}: {link}"
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / link).exists()
    ]
    assert dead == []


def test_every_quarantine_reason_is_explained():
    sources = "".join(path.read_text() for path in (PACKAGE / "corpus").glob("*.py"))
    called = r"(?:BadVolume|UnusableExam|quarantined)\((?:\w+(?:\[0\])?, )?\s*\"([a-z_]+)\""
    raised = {UNREADABLE, *re.findall(called, sources), *re.findall(r"reason, detail = \"([a-z_]+)\"", sources)}
    explained = re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs/data.md").read_text(), flags=re.MULTILINE)
    assert len(raised) > 20
    assert sorted(explained) == sorted(raised)


def test_the_strengths_of_the_phantom_stand_in_its_document():
    expected = [(task, s.trait, f"{s.effect_sd:+.1f}") for task, several in STRENGTHS.items() for s in several]
    text = (ROOT / "docs/phantom.md").read_text()
    assert re.findall(r"^\| (\w+) \| (\w+) \| ([+-]\d\.\d) \|", text, flags=re.MULTILINE) == expected


def our_files() -> Iterator[Path]:
    """What people wrote: not what tools made."""
    for path in [*ROOT.iterdir(), *(p for folder in WRITTEN_BY_US for p in (ROOT / folder).rglob("*"))]:
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path


def test_no_file_names_a_place_on_one_machine():
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in our_files()
        for line in path.read_text(encoding="utf-8").splitlines()
        if MACHINE_PATH.search(line) and path.name != "test_house.py"
    ]
    assert found == []
    assert MACHINE_PATH.search("see /home/someone/data")
    assert not MACHINE_PATH.search("https://example.org/work/page")


# ---------------------------------------------------------------- packaging


def test_a_wheel_carries_recipes_and_slurm(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"umbif/_recipes/{name}.yaml" for name in RECIPES} <= set(names)
    assert any(name.startswith("umbif/_slurm/") for name in names)
    assert {f"umbif/{file}" for file in SOURCES} <= set(names)
    assert "umbif/pages/templates/report.html.j2" in names
