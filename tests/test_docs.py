"""The documentation: its commands exist, formulas and messages are the code's, no name is missing."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import gradent
from gradent import EntanglementCallback, losses, proxies, trainer
from gradent.cli.app import app
from tests.pages import GIVEN, NOT_RUN, ROOT, commands, fences, given_in, run_python, train_my_run

PAGES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_my_run(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with given_in(tmp_path, world):
        yield tmp_path


@pytest.mark.parametrize(("page", "line"), list(NOT_RUN))
def test_what_is_not_run_is_still_there(page: str, line: str) -> None:
    assert [block for block in fences(PAGES[page], "python") if line in block.splitlines()]


def block_with(line: str) -> str:
    return next(block for block in fences(PAGES["recipes.md"], "python") if line in block.splitlines())


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **content: Any) -> None:
    """A module of another package, as far as a recipe touches it: this shows the recipe's side alone."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    vars(sys.modules[module]).update(content)


def test_the_plugin_of_the_axolotl_recipe_hands_over_a_callback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names = run_python([block_with("from axolotl.integrations.base import BasePlugin")], "recipes.md")
    plugin: Any = names["EntanglementPlugin"]
    (callback,) = plugin().add_callbacks_post_trainer(types.SimpleNamespace(output_dir="out"), trainer=None)
    assert isinstance(callback, EntanglementCallback) and callback.every == 10
    paths = re.findall(r"- (my_plugins\S+)", PAGES["recipes.md"])
    assert paths == ["my_plugins.entanglement.EntanglementPlugin"]


def test_the_script_of_the_llama_factory_recipe_passes_a_callback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[Any] = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda callbacks: passed.extend(callbacks))
    source = block_with("from llamafactory.train.tuner import run_exp")
    exec(compile(source, "recipes.md", "exec"), {"__name__": "__main__"})
    assert [type(each) for each in passed] == [EntanglementCallback]


def test_the_plugin_of_the_ms_swift_recipe_registers_a_callback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=known)
    run_python([block_with("from swift.callbacks import callbacks_map")], "recipes.md")
    callback = known["gradent"](types.SimpleNamespace(output_dir="out"), None)
    assert isinstance(callback, EntanglementCallback) and callback.every == 10


class LoopOfOpenRLHF:
    """As OpenRLHF's trainer: two micro-batches a step, whose losses the engine divides by two."""

    def __init__(self, model: torch.nn.Module, batch: gradent.PairBatch) -> None:
        self.model, self.batch, self.told = model, batch, []
        self.strategy = types.SimpleNamespace(
            _unwrap_model=lambda model: model, accumulated_gradient=2, is_rank_0=lambda: True,
            backward=lambda loss, *_: (loss / 2).backward(),
        )  # fmt: skip
        self._wandb = types.SimpleNamespace(log=self.told.append)
        self._tensorboard = None

    def fit(self) -> None:
        for _ in range(4):
            ids, marks = self.batch.input_ids, self.batch.completion_mask[:, 1:]
            logps = self.model(ids, attention_mask=self.batch.attention_mask).logits[:, :-1].log_softmax(-1)
            chosen, rejected = (logps.gather(-1, ids[:, 1:, None])[..., 0] * marks).sum(1).chunk(2)
            self.strategy.backward(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean(), self.model, None)


def test_the_script_of_the_openrlhf_recipe_logs_every_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "openrlhf.trainer", dpo_trainer=types.SimpleNamespace(DPOTrainer=LoopOfOpenRLHF))
    names = run_python([GIVEN, block_with("from openrlhf.trainer import dpo_trainer")], "recipes.md")
    model: Any = names["model"]
    trainer: Any = names["WatchedDPOTrainer"]
    loop = trainer(model, names["batch"])
    loop.fit()
    assert [scalars["train/global_step"] for scalars in loop.told] == [1, 2]
    assert all(scalars["gradent/weight_ratio"] == pytest.approx(1) for scalars in loop.told)
    assert loop.told[0]["gradent/cosine"] == pytest.approx(
        float(gradent.measure(model, names["batch"]).cosine.mean()), abs=1e-5
    )


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands(text, "gradent")]
GROUP: Any = typer.main.get_command(app)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[1])
def test_gradent_commands_parse(page: str, command: list[str], folder: Path) -> None:
    GROUP.commands[command[1]].make_context(command[1], command[2:])


def test_an_unknown_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        GROUP.commands["plan"].make_context("plan", ["my-model", "--lenght", "3"])


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_in_the_text_exist(page: str) -> None:
    for span in re.findall(r"`((?:gradent|accelerate launch -m gradent) [^`]+)`", PAGES[page].replace("\n", " ")):
        words = shlex.split(span)[shlex.split(span).index("gradent") + 1 :]
        if words[0] == "COMMAND" or words[0].startswith("--"):
            continue
        known = {option for each in GROUP.commands[words[0]].params for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, span
    for module in re.findall(r"`python -m ((?:scripts|benchmarks)\.\w+)", PAGES[page].replace("\n", " ")):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


PUBLIC = [
    (module.__name__, name)
    for module in (gradent, losses, proxies, trainer)
    for name in module.__all__
    if name != "__version__"
]


def canonical(value: Any, module: str, name: str) -> str:
    """How mkdocstrings is told of a name: by the module that defines it."""
    if inspect.ismodule(value):
        return value.__name__
    home = getattr(value, "__module__", None)
    return f"{home}.{value.__qualname__}" if home and hasattr(value, "__qualname__") else f"{module}.{name}"


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_the_reference_has_every_public_name_with_a_docstring(module: str, name: str) -> None:
    value = getattr(sys.modules[module], name)
    path = canonical(value, module, name)
    listed = set(re.findall(r"^::: (\S+)$", PAGES["api.md"], flags=re.MULTILINE))
    if inspect.ismodule(value):
        assert any(each.startswith(f"{path}.") for each in listed), path
    else:
        assert listed & {path, path.rpartition(".")[0]}, path
    if isinstance(value, dict):
        assert attribute_docstring(module, name)
        return
    assert inspect.getdoc(value)
    assert undocumented(value) == []


def attribute_docstring(module: str, name: str) -> str:
    """The text behind an assignment of a module."""
    body = ast.parse(Path(str(sys.modules[module].__file__)).read_text("utf-8")).body
    for at, node in enumerate(body[:-1]):
        after = body[at + 1]
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name and isinstance(after, ast.Expr):
            return str(ast.literal_eval(after.value))
    return ""


def undocumented(value: Any) -> list[str]:
    """Public methods and properties of a class that say nothing of themselves."""
    if not inspect.isclass(value):
        return []
    own = {name: each for name, each in vars(value).items() if not name.startswith("_")}
    callables = (types.FunctionType, classmethod, staticmethod, property)
    return [name for name, each in own.items() if isinstance(each, callables) and not inspect.getdoc(each)]


def test_the_check_of_docstrings_can_fail() -> None:
    class Silent:
        def method(self) -> None: ...

    assert undocumented(Silent) == ["method"]
    assert attribute_docstring("gradent.losses", "nothing") == ""


# The page of the losses: its formulas as Python.

GREEK = {
    "λ_w": "lambda_w", "λ_l": "lambda_l", "β": "beta", "λ": "lam", "α": "alpha", "γ": "gamma", "δ": "delta",
    "Δ": "margin", "·": "*", "²": "**2", "log σ(": "logsigmoid(", "σ(": "sigmoid(", "max(0, ": "relu(",
}  # fmt: skip


def evaluate(formula: str, names: dict[str, Any]) -> Any:
    """A formula of the page."""
    python = re.sub(r"1\[([^\]]+)\]", r"(\1).double()", formula)
    python = re.sub(r"\bz\b", "z_ref", python)
    for sign, word in GREEK.items():
        python = python.replace(sign, word)
    functions = {"sigmoid": torch.sigmoid, "logsigmoid": torch.nn.functional.logsigmoid, "relu": torch.relu}
    return eval(python, {"__builtins__": {}}, {**functions, **names})


def rows_of_losses(columns: int) -> dict[str, list[str]]:
    """The rows of the page's table with so many columns, by name."""
    lines = [line for line in PAGES["losses.md"].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells if len(row) == columns}


def test_the_page_lists_the_losses() -> None:
    assert list(rows_of_losses(5)) == list(rows_of_losses(3)) == losses.available() == list(losses.LOSSES)
    assert all(f'"{name}"' in PAGES["losses.md"] for name in losses.DESIGNS)


@pytest.mark.parametrize("name", losses.available())
def test_the_formulas_of_the_page_are_those_of_the_code(name: str) -> None:
    (where, value, d_w, d_l), (defaults, needs) = rows_of_losses(5)[name], rows_of_losses(3)[name]
    loss = losses.get(name)
    shown = dict(part.split("=") for part in defaults.strip("`").split(", "))
    own = {each.name: getattr(loss, each.name) for each in fields(loss) if each.init}
    assert shown == {key: repr(each) for key, each in own.items()}
    assert ("reference" in needs, "lengths" in needs) == (loss.needs_reference, loss.needs_lengths)

    draw = torch.Generator().manual_seed(0)
    s_w, s_l, r_w, r_l = (-9 * torch.rand(64, generator=draw, dtype=torch.float64) for _ in range(4))
    n_w, n_l = (torch.randint(1, 9, (64,), generator=draw).double() for _ in range(2))
    hyper = {key: each + 0.03 for key, each in own.items() if not isinstance(each, bool)}  # not the defaults
    names = {"s_w": s_w, "s_l": s_l, "r_w": r_w, "r_l": r_l, "n_w": n_w, "n_l": n_l, **hyper}
    names["margin"] = (s_w - r_w) - (s_l - r_l)
    for definition in filter(None, (part.strip("` ") for part in where.split(", `"))):
        letter, formula = definition.split(" = ")
        names[letter] = evaluate(formula, names)
    given = dict(zip(losses.base.LOGPS + losses.base.REFERENCE, (s_w, s_l, r_w, r_l), strict=True))
    loss, lengths = losses.get(name, **hyper), {"chosen_len": n_w, "rejected_len": n_l}
    torch.testing.assert_close(evaluate(value.strip("`"), names), loss.value(**given, **lengths))
    for formula, weight in zip((d_w, d_l), loss.weights(**given, **lengths), strict=True):
        torch.testing.assert_close(evaluate(formula.strip("`"), names), weight)


def test_a_wrong_formula_would_be_noticed() -> None:
    names = {"a": torch.tensor([0.5]), "beta": 0.1, "lam": 2.0}
    assert evaluate("β·σ(-a) + λ·1[a < 0]", names) == 0.1 * torch.sigmoid(torch.tensor(-0.5))
    assert evaluate("β·σ(a) + λ·1[a < 0]", names) != 0.1 * torch.sigmoid(torch.tensor(-0.5))


# The page of symptoms: what it quotes is said somewhere.


def said_by_gradent() -> list[str]:
    """Every text in gradent's code, what is filled in replaced by a sign."""
    found = []
    for path in (ROOT / "gradent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "¤" for part in node.values)
                found.append("".join(parts))
    return found


def quoted() -> list[str]:
    """Messages that the page quotes: in its headings, and in the first column of its table."""
    text = PAGES["troubleshooting.md"]
    headings = re.findall(r'^### .*?"(.+)"$', text, flags=re.MULTILINE)
    cells = re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE)
    return headings + [cell for cell in cells if cell not in {"behind the colon", "---"}]


def is_said(message: str, texts: list[str]) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), flags=re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_quoted_messages_are_those_of_the_code() -> None:
    texts = said_by_gradent()
    assert len(quoted()) > 15
    assert [message for message in quoted() if not is_said(message.strip(". ").removesuffix(":"), texts)] == []
    assert not is_said("gradent measures this model two rows a forward", texts)


# The notebook, and the site.

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.nightly
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for path in ((ROOT / "examples" / "tiny.py"), NOTEBOOK):
        shutil.copy(path, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    pytest.importorskip("mkdocs")
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build  # noqa: PLC0415
    from mkdocs.config import load_config  # noqa: PLC0415

    out = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out)))
    return out


@pytest.mark.nightly
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    remote = []
    for path in pages:
        text = path.read_text("utf-8")
        remote += re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>", text)
    for path in site.rglob("*.css"):
        remote += re.findall(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//[^)\"']*", path.read_text("utf-8"))
    assert remote == []


@pytest.mark.nightly
def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    lost = []
    for page in (each for each in site.glob("*.html") if each.name != "404.html"):  # whose links are a server's
        for link in re.findall(r"<a\b[^>]*\bhref=\"([^\"#]+)", page.read_text("utf-8")):
            if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists():
                lost.append((page.name, link))
    assert lost == []


@pytest.mark.nightly
def test_the_reference_on_the_site_has_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text("utf-8")
    missing = []
    for module, name in PUBLIC:
        path = canonical(getattr(sys.modules[module], name), module, name)
        if path not in {"gradent.losses", "gradent.proxies"} and f'id="{path}"' not in text:
            missing.append(path)
    assert missing == []
