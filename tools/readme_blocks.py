"""The README's commands as scripts, so that each is run as written and none can rot.

    python tools/readme_blocks.py README.md FOLDER     FOLDER/01.bash, FOLDER/02.bash, FOLDER/03.py

A block fenced as ```bash or ```python becomes a script; ```text (what needs a network, a GPU or a
cluster, or takes its input from elsewhere) and ```bibtex do not, and any other fence is refused.
Blocks of Python and the first two of bash, which install, train on the sample and test, stay as
they are. In the other bash blocks what takes long is shortened, and what needs data that is not
there takes the shipped sample, by these rules:

    train_*.py                 makes ``-epochs 1`` and takes ``--sample``, not ``--image-folder``
    evaluate.py, plot.py       take ``--sample``, not ``--image-folder``
    runs/NAME_seedN            becomes runs/NAME_sample_seedN, the folder that such a run fills
    benchmark.py               makes ``--rounds 1``
    reproduce.py, if it runs   lists what it would run, as if there were no results; the first
                               command of the list is run, shortened as well

Needs nothing but Python itself.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {"bash": ".bash", "python": ".py"}
SHOWN = ("text", "bibtex")  # what is no command
AS_WRITTEN = 2  # blocks of bash in front

FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>[^`]*)")
OPTION = r"(?<!\S){}(?: +|=)(?:'[^']*'|\"[^\"]*\"|[^\s|&;>]+) *"  # with its value
RUNS = r"python reproduce\.py(?: +(?:'[^']*'|\"[^\"]*\"|[^\s|&;<>#'\"])+)*"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of its fence, from 1 on."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a document, in order.

    Raises:
        ValueError: a block has no end, or its language is none of those named above.
    """
    found, lines = [], enumerate(markdown.splitlines(), start=1)
    for number, line in lines:
        opened = FENCE.fullmatch(line)
        if not opened:
            continue
        indent, fence, text = len(opened["indent"]), opened["fence"], []
        for _, inner in lines:
            if re.fullmatch(rf" *{fence[0]}{{{len(fence)},}} *", inner):
                break
            text.append(inner[min(indent, len(inner) - len(inner.lstrip(" "))) :] + "\n")
        else:
            raise ValueError(f"line {number}: the block has no end")
        language = opened["language"].strip()
        if language not in (*SUFFIXES, *SHOWN):
            known = ", ".join((*SUFFIXES, *SHOWN))
            raise ValueError(f"line {number}: fenced as {language!r}, not as one of {known}")
        found.append(Block(language, "".join(text), number))
    return found


def shortened(commands: str) -> str:
    """Commands of bash by the rules above."""
    text = commands.replace("\\\n", " ")
    for option in ("--image-folder", "--?epochs", "--rounds"):
        text = re.sub(OPTION.format(option), "", text)
    text = re.sub(r"(train_\w+\.py)\b", r"\1 -epochs 1 --sample", text)
    text = re.sub(r"\b((?:evaluate|plot)\.py)\b", r"\1 --sample", text)
    text = re.sub(r"\b(benchmark\.py)\b", r"\1 --rounds 1", text)
    text = re.sub(r"\b(runs/\w+?)(?:_sample|_folder)?(_seed\d)", r"\1_sample\2", text)
    return re.sub(RUNS, _first_of_list, text)


def _first_of_list(match: re.Match) -> str:
    """A ``reproduce.py`` that would run for days runs the first command of its list instead."""
    command = match[0]
    if re.search(r" --?(list|collect|table|figures|help|h)\b", command):
        return command
    first = "sed -n '1s/$/ -epochs 1 --sample/p' | sh"
    return f'{command} --results "$(mktemp -d)" --list | {first}'


def scripts(markdown: str) -> dict[str, str]:
    """Name and text of the scripts to be run, in order.

    Raises:
        ValueError: as for ``blocks``.
    """
    named, bash = {}, 0
    for block in blocks(markdown):
        if block.language in SUFFIXES:
            bash += block.language == "bash"
            keep = block.language == "python" or bash <= AS_WRITTEN
            name = f"{len(named) + 1:02}{SUFFIXES[block.language]}"
            named[name] = block.text if keep else shortened(block.text)
    return named


def main(readme: str, folder: str) -> None:
    """Writes the scripts of a document into a new folder."""
    try:
        made = scripts(Path(readme).read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"{readme}, {error}")
    try:
        Path(folder).mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{folder} is there already: name a new folder")
    for name, text in made.items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} README.md FOLDER")
    main(*sys.argv[1:])
