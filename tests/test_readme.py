"""README and docs are right: a README that fits, and no link, file, command or option in them that is not there."""

import importlib
import itertools
import re
import shlex

import pytest
from conftest import ROOT

import dit
import vae
from common import utils
from studies import variants

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
ROOMS = ("common", "bench", "studies", "tests", "docs")


def links(text):
    """Targets of markdown links and pictures, and of HTML's, without the heading they point to."""
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [target.split("#")[0] for target in found]


def commands(text):
    """Command lines in blocks of code and in inline code, as lists of words; variables of the shell are put in."""
    fenced = r"^```\w*\n(.*?)^```"
    indented = r"^(?: {4}|\t)(.*)$"
    unfenced = re.sub(fenced, "", text, flags=re.M | re.S)
    blocks = "\n".join(re.findall(fenced, text, re.M | re.S) + re.findall(indented, unfenced, re.M))
    prose = re.sub(indented, "", unfenced, flags=re.M)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    variables = {}
    for line in [*re.sub(r"\\\n", " ", blocks).splitlines(), *inline]:
        if not re.match(r"(\w+=|export |/usr/bin/time|torchrun |python |make )", line):
            continue  # tables of figures, file names
        words = shlex.split(re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line), comments=True)
        while words and re.match(r"\w+=", words[0]):
            name, value = words.pop(0).split("=", 1)
            variables[name] = value
        start = [i for i, word in enumerate(words) if word in ("python", "torchrun", "make")]
        if start:
            yield words[start[0] :]


def parse(name, words):
    """Why a script does not take these words, or nothing."""
    if name == "studies.variants":
        if not words:
            return []
        found = []
        with pytest.MonkeyPatch.context() as patch:
            for stage in (vae, dit):
                patch.setattr(stage, "main", lambda rest, *networks, stage=stage: found.extend(parse(stage.__name__, rest)))
            try:
                variants.main(words)
            except SystemExit:
                found.append(f"{name} {words[0]} does not parse")
        return found
    module = importlib.import_module(name)
    words = [word for word in words if word != "|"]  # topic | topic
    topics, count = getattr(module, "TOPICS", {}), 0
    while words and not words[0].startswith("-") and (topics or count < {"fvd": 2, "fit": 1}.get(name, 0)):
        if topics and words[0] not in topics:
            return [f"{name} has no topic {words[0]}"]
        words, count = words[1:], count + 1
    settings = module.Config
    if commands := getattr(module, "COMMANDS", {}):  # each with settings and files of its own
        if words == ["--help"]:
            return []
        if not words or words[0] not in commands:
            return [f"{name} has no command {' '.join(words[:1])}"]
        _, settings, _, files = commands[words[0]]
        given = len(list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:])))
        enough = given == len(files) or (given and "…" in files)
        if not enough and "--help" not in words:
            return [f"{name} {words[0]} takes {len(files)} files"]
        words = words[1 + given :]
    fields = {"--" + field.replace("_", "-"): about for field, about in settings.__dataclass_fields__.items()}
    known = {*fields, *(option.replace("--", "--no-", 1) for option, about in fields.items() if about.type is bool), "--help"}
    if unknown := [word for word in words if word.startswith("-") and word.split()[0] == word and word not in known]:
        return [f"{name} has no {' '.join(unknown)}"]  # argparse would take the beginning of an option for it
    words = [word for word in words if word != "--help"]
    numbers = [option for option, about in fields.items() if about.type in (int, float)]
    for i, option in enumerate(words[:-1]):
        if option in numbers and re.fullmatch("[A-Z]+", words[i + 1]):  # --steps STEPS: the reader puts a number there
            words[i + 1] = "1"
    try:
        config = utils.parse_options(settings, "", argv=words)
    except SystemExit:
        return [f"{name} {' '.join(words)} does not parse"]
    found = []
    for stage in ("vae", "dit"):  # options handed on, to the trainings or to those with variants
        if given := shlex.split(getattr(config, f"{stage}_options", "")):
            found += parse("studies.variants", [stage, *given]) if name == "studies.ablate" else parse(stage, given)
    return found


def lost_links(text, folder):
    return [target for target in links(text) if target and "://" not in target and not (folder / target).exists()]


def lost_files(text, folder):
    """Scripts, pages and files of docs/ named anywhere; scripts of other projects have folders of their own in their names."""
    names = {name.removeprefix("../") for name in re.findall(r"[\w./-]*\w\.(?:py|md)\b|\bdocs/[\w./-]*\w", text)}
    ours = {name for name in names if "/" not in name or name.split("/")[0] in ROOMS}
    return sorted(name for name in ours if not (ROOT / name).is_file() and not (folder / name).is_file())


def lost_options(text, folder):
    """Options named in prose: some script must have them."""
    known = {"--help", *("--" + name for name in [*variants.DEFAULTS, "denoiser"])}
    for path in (path for room in ("", "bench", "studies") for path in (ROOT / room).glob("*.py")):
        if "class Config" in path.read_text():
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name)
            for settings in (module.Config, *(command[1] for command in getattr(module, "COMMANDS", {}).values())):
                known |= {"--" + field.replace("_", "-") for field in settings.__dataclass_fields__}
    named = re.findall(r"`(--[\w-]+)", text)
    return [name for name in named if name not in known and name.replace("--no-", "--") not in known]


def wrong_commands(text, folder):
    wrong = []
    for words in commands(text):
        if words[0] == "make":
            wrong += [f"make {word}" for word in words[1:] if f"\n{word}:" not in (ROOT / "Makefile").read_text()]
            continue
        if words[1] == "-m":
            name, rest = words[2], words[3:]
        else:
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
            name, rest = words[script].removesuffix(".py"), words[script + 1 :]
        if not (ROOT / f"{name.replace('.', '/')}.py").is_file():
            wrong.append(f"no such script: {' '.join(words)}")
        else:
            wrong += parse(name, rest)
    return wrong


def private_places(text, folder):
    """Absolute paths of somebody's machine, hosts that others cannot reach, options of pip that name a host."""
    paths = re.findall(r"""(?<![\w.:/>*)\]}"'…-])/(?!usr/bin/)[A-Za-z]\S*""", text)
    hosts = re.findall(r"\w+://([^/\s)>\"]+)", text)
    private = [
        host for host in hosts if not re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", host) or re.search(r"\.(local|lan|internal)$", host)
    ]
    return paths + private + re.findall(r"index-url|find-links|trusted-host", text)


CHECKS = [lost_links, lost_files, lost_options, wrong_commands, private_places]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_is_there(page, check):
    assert check(page.read_text(), page.parent) == []


def test_the_readme_fits():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    targets = links(text)
    assert {f"docs/{page.name}": targets.count(f"docs/{page.name}") for page in DOCS} == {
        f"docs/{page.name}": 1 for page in DOCS
    }
    files = {path.name for path in ROOT.glob("*.py")} | {"common", "bench", "studies"}
    assert files <= set(targets), "the list of files lacks some"


def test_commands_are_found():
    found = [" ".join(words) for page in PAGES for words in commands(page.read_text())]
    for start in ("make demo", "torchrun", "python vae.py", "python -m studies.ablate", "python -m bench.speed"):
        assert any(command.startswith(start) for command in found), start
    text = (
        '    nano="--steps 2"   # a variable\n    X=1 python vae.py $nano \\\n        --lr 1\n\nand `python\n-m a.b` | `x.py`\n'
    )
    assert list(commands(text)) == ["python vae.py --steps 2 --lr 1".split(), "python -m a.b".split()]


@pytest.mark.parametrize(
    "check, text",
    [
        (lost_links, "![a picture](docs/nothing.png)"),
        (lost_links, "[a page](docs/nothing.md#here)"),
        (lost_links, '<img src="docs/nothing.png">'),
        (lost_files, "see nothing.py"),
        (lost_files, "see `common/nothing.py`"),
        (lost_files, "see docs/nothing.md"),
        (lost_files, "    cp docs/nothing.csv ."),
        (lost_options, "with `--nothing 3`"),
        (wrong_commands, "    make nothing"),
        (wrong_commands, "    python nothing.py"),
        (wrong_commands, "    python -m bench.nothing"),
        (wrong_commands, "    python -m bench.costs nothing"),
        (wrong_commands, "    python vae.py nothing"),
        (wrong_commands, "    python vae.py --side skip"),
        (wrong_commands, "    python vae.py --step 2"),
        (wrong_commands, "    python vae.py --steps many"),
        (wrong_commands, "    python vae.py --preset XL"),
        (wrong_commands, "    A=1 torchrun --standalone --nproc_per_node=8 dit.py --nothing"),
        (wrong_commands, "    python fvd.py real/ generated/ more/"),
        (wrong_commands, "    python codec.py copy a.mp4 b.nerv"),
        (wrong_commands, "    python codec.py encode a.mp4"),
        (wrong_commands, "    python codec.py compare --size 64"),
        (wrong_commands, "    python codec.py decode a.nerv b.mp4 --refine 3"),
        (wrong_commands, "    python -m studies.variants vae --denoiser gpt"),
        (wrong_commands, '    python -m studies.ablate --only 2c --vae-options "--nothing 2"'),
        (wrong_commands, '    python demo.py --dit-options "--denoiser gpt"'),
        (wrong_commands, '    o="--nothing 2"\n    python vae.py $o'),
        (wrong_commands, "in prose, `python sample.py\n--nothing`"),
        (wrong_commands, "```bash\npython sample.py --nothing\n```"),
        (private_places, "in `/somewhere/else`"),
        (private_places, "http://packages.lan/simple"),
        (private_places, "http://10.0.0.1/simple"),
        (private_places, "http://packages:8080/simple"),
        (private_places, "pip install --index-url"),
    ],
)
def test_each_check_can_fail(check, text, capsys):
    assert check(text, ROOT)


@pytest.mark.parametrize(
    "text",
    [
        "    python -m studies.variants dit --denoiser gpt --steps 3",
        "    python -m studies.variants vae --side skip --pos-size 2 --no-flip",
        '    python -m studies.ablate --vae-options "--steps 600 --side none"',
        "    python -m bench.costs costs | train --preset L",
        "    python vae.py --preset L --help",
        "    python vae.py --steps STEPS",
        "the source is src/metrics/nothing.py, https://github.com/a/b and 3 / s, `--no-flip` and `--side skip`",
    ],
)
def test_what_is_right_passes(text):
    assert [problem for check in CHECKS for problem in check(text, ROOT)] == []
