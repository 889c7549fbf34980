"""README and docs are right: a README that fits, and no link, file, command or option in them that is not there."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

from common import utils

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
ROOMS = ("common", "extras", "siblings", "bench", "studies", "tests", "docs")
SCRIPTS = [path for room in ("", *ROOMS) for path in (ROOT / room).glob("*.py") if "__main__" in path.read_text()]


def links(text):
    """Targets of links and pictures, without the heading they point to."""
    return [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]


def commands(text):
    """Command lines in indented blocks and in inline code, as lists of words; variables of the shell are put in."""
    block = r"^ {4}(.*)$"
    inline = re.findall(r"`([^`]+)`", re.sub(block, "", text, flags=re.M))
    variables = {}
    for line in [*"\n".join(re.findall(block, text, re.M)).replace("\\\n", " ").splitlines(), *inline]:
        if not re.match(r"(\w+=|torchrun |python |make )", line):
            continue  # tables of figures, file names
        words = shlex.split(re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line), comments=True)
        while words and re.match(r"\w+=", words[0]):
            name, value = words.pop(0).split("=", 1)
            variables[name] = value
        if words and words[0] in ("python", "torchrun", "make"):
            yield words


class Parsed(Exception):
    pass


def problem(name, words):
    """Why a script does not take these words, or "": its own main runs until its options are parsed."""
    module, parse = importlib.import_module(name), utils.parse_options

    def parse_and_stop(*args, **kw):
        raise Parsed(parse(*args, **kw))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "parse_options", parse_and_stop)
        patch.setattr("sys.argv", [name, *words])
        try:
            module.main()
        except Parsed as stop:
            handed = {stage: shlex.split(getattr(stop.args[0], f"{stage}_options", "")) for stage in ("vae", "dit")}
        except (utils.UserError, SystemExit) as error:
            return "" if words[-1:] in (["--help"], ["-h"]) else f"{name} {' '.join(words)}: {error}"
        else:
            return ""
    return "".join(problem("studies.variants", [stage, *rest]) for stage, rest in handed.items() if rest)


def lost_links(text, folder):
    return [target for target in links(text) if target and "://" not in target and not (folder / target).exists()]


def lost_files(text, folder):
    """Scripts, pages and files of docs/ named anywhere; scripts of other projects have folders of their own in their names."""
    names = {name.removeprefix("../") for name in re.findall(r"[\w./-]*\w\.(?:py|md)\b|\bdocs/[\w./-]*\w", text)}
    ours = {name for name in names if "/" not in name or name.split("/")[0] in ROOMS}
    return sorted(name for name in ours if not (ROOT / name).is_file() and not (folder / name).is_file())


def lost_options(text, folder):
    """Options named in prose: some script must have them."""
    known = "\n".join(path.read_text() for path in SCRIPTS)
    named = {name.removeprefix("--").removeprefix("no-") for name in re.findall(r"`(--[\w-]+)", text)} - {"help"}
    has = r'\b{}: (int|float|str|bool|list)\b.*option\(|"--{}"|"{}": '
    return [name for name in named if not re.search(has.format(name.replace("-", "_"), name, name.replace("-", "_")), known)]


def wrong_commands(text, folder):
    wrong = []
    for words in commands(text):
        if words[0] == "make":
            wrong += [f"make {word}" for word in words[1:] if f"\n{word}:" not in (ROOT / "Makefile").read_text()]
            continue
        script = 2 if words[1] == "-m" else next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
        name, rest = words[script].removesuffix(".py"), words[script + 1 :]
        if ROOT / f"{name.replace('.', '/')}.py" not in SCRIPTS:
            wrong.append(f"no such script: {' '.join(words)}")
        elif error := problem(name, rest):
            wrong.append(error)
    return wrong


CHECKS = [lost_links, lost_files, lost_options, wrong_commands]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_is_there(page, check):
    assert check(page.read_text(), page.parent) == []


def test_the_readme_fits_and_leads_everywhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(list(commands(text))) > 15
    assert sum(len(page.read_text().splitlines()) for page in (ROOT / "docs").glob("*.md")) <= 1400
    files = {path.name for path in ROOT.glob("*.py")} | set(ROOMS) - {"tests", "docs"}
    assert files <= set(links(text))
    found = {target.split("/")[-1] for page in PAGES for target in links(page.read_text())}
    assert {page.name for page in DOCS} <= found


WRONG = {
    lost_links: ["[a](docs/nothing.md#here)"],
    lost_files: ["see `common/nothing.py`", "see docs/nothing.md"],
    lost_options: ["with `--nothing 3`"],
    wrong_commands: [
        "    make nothing", "    python nothing.py", "    python -m bench.nothing", "    python vae.py --step 2",
        "    A=1 torchrun --standalone --nproc_per_node=8 dit.py --nothing", '    o="--nothing 2"\n    python vae.py $o',
        "    python -m siblings.codec compare a.mp4 --side 64", '    python -m studies.ablate --vae-options "--nothing 2"',
        "in prose, `python sample.py\n--nothing`",
    ],
}  # fmt: skip
RIGHT = """
    nano="--steps 2"   # a variable
    X=1 python vae.py $nano \\
        --lr 1 --extras --no-flip
    python -m studies.variants vae --side skip --steps 2
    python -m siblings.codec encode a.mp4 b.nerv --bits 6
the source is src/metrics/nothing.py, `--no-flip` and `--side skip`, `python vae.py --preset L
--help`
"""


def test_each_check_can_fail_and_passes_what_is_right():
    for check, texts in WRONG.items():
        assert [text for text in texts if not check(text, ROOT)] == []
        assert check(RIGHT, ROOT) == []
    assert next(commands(RIGHT)) == "python vae.py --steps 2 --lr 1 --extras --no-flip".split()
