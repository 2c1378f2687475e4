"""Tables: the statistics in them, what they mark, and that the README's are those of results/."""

import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import made_up_run
from scipy.stats import ttest_ind

from pcdeq.experiments.errors import RunError
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.reproduce import references
from pcdeq.experiments.results import RECIPES, collect, read_results
from pcdeq.experiments.tables import (
    BEGIN,
    END,
    Reference,
    as_reference,
    compare,
    duration,
    parameter_count,
    render,
    spread,
    write_between,
)

ROOT = Path(__file__).resolve().parents[1]
LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]
ACCURACIES = st.lists(st.integers(9000, 10000).map(lambda n: n / 100), min_size=2, max_size=6)


def rows(text: str, what: str = "") -> list[list[str]]:
    """The cells of a Markdown text's table lines that hold ``what``."""
    lines = [line for line in text.splitlines() if line.startswith("|") and what in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def measured(folder: Path, recipe=LINEAR, seeds=1, **changes) -> list:
    for seed in range(seeds):
        made_up_run(folder / "run", recipe, seed, **changes)
        collect(folder / "run", folder)
    return read_results(folder)


def test_the_deviation_is_the_samples_and_one_seed_has_none():
    assert spread([98.0, 98.1, 98.3]) == "98.13 ± 0.15 (n = 3)"  # √(0.14/3/2) = 0.1528
    assert spread([98.0]) == "98.00 (n = 1)"


def test_a_difference_comes_with_its_interval_and_a_word():
    # Variances 0.01 and 0.04 over three each: √(0.05/3) = 0.129, times t = 3.22 of 2.94 degrees.
    assert (
        compare([98.1, 98.2, 98.3], [97.8, 98.0, 98.2])
        == "+0.20 (-0.22 to +0.62), no difference seen"
    )
    assert compare([98.1, 98.2, 98.3], [95.8, 96.0, 96.2]) == "+2.20 (+1.78 to +2.62), higher"
    assert compare([95.8, 96.0, 96.2], [98.1, 98.2, 98.3]) == "-2.20 (-2.62 to -1.78), lower"
    assert compare([99.05], [99.16]) == "-0.11, too few seeds to tell"
    assert compare([99.05, 99.07], [99.16]) == "-0.10, too few seeds to tell"
    assert compare([99.0, 99.0], [98.0, 98.0]) == "+1.00 (+1.00 to +1.00), higher"


@given(ACCURACIES, ACCURACIES)
def test_the_word_is_that_of_welchs_test(ours, theirs):
    if min(stdev(ours), stdev(theirs)) < 1e-3:
        return
    p = ttest_ind(ours, theirs, equal_var=False).pvalue
    if abs(p - 0.05) < 1e-6:
        return
    word = "no difference seen" if p > 0.05 else "higher" if mean(ours) > mean(theirs) else "lower"
    assert compare(ours, theirs).endswith(word)


def test_without_results_every_row_is_not_run_and_has_its_parameters():
    cells = rows(render(ROWS, []), "not run")
    assert len(cells) == 32
    assert cells[0] == ["MNIST", "linear pcDEQ-1", "tanh", "70,410", "not run", "", "", ""]
    assert cells[-1][:4] == ["CIFAR-10 --aug", "multi conv pcDEQ-2", "sigmoid", "661,470"]
    for title in ("MNIST", "SVHN", "CIFAR-10"):
        assert f"<details><summary>{title}: no row was run whole yet" in render(ROWS, [])
    assert render(ROWS, []).count("<details>") == render(ROWS, []).count("</details>") == 3


def test_a_line_has_means_over_seeds_and_the_command(tmp_path):
    results = measured(tmp_path, seeds=3)
    text = render([LINEAR], results)
    (cells,) = rows(text, "tanh")
    assert cells[4] == spread([result.test_acc[-1] for result in results])
    assert cells[5] == spread([max(result.test_acc) for result in results])
    assert cells[6:] == ["12.0 / 9.0", "1.3 min A"]
    assert "A: Slide rule, 1 thread, torch" in text
    assert "python train_mnist.py -net linear_pcdeq_1 -activ tanh --seed S  # S = 0, 1, 2" in text
    assert "†" not in text and "‡" not in text and "no row was run" not in text


def test_what_is_not_genuine_or_was_cut_short_is_marked_and_averaged_apart(tmp_path):
    for changes in ({}, {"image_folder": "digits"}, {"seed": 1, "ran": 7}, {"seed": 2}):
        made_up_run(tmp_path / "run", LINEAR, **changes)
        collect(tmp_path / "run", tmp_path)
    text = render([LINEAR], read_results(tmp_path), [Reference("X", "there", {LINEAR.name: [98]})])
    whole, short, foreign = rows(text, "linear")
    assert whole[0] == short[0] == "MNIST" and foreign[0] == "MNIST †"
    assert "(n = 2)" in whole[4] and "‡" not in whole[4]
    assert short[4].endswith("(n = 1), 7 of 40 epochs ‡")
    assert "† Not the genuine data set" in text and "‡ Cut short" in text
    assert whole[-1] and not short[-1] and not foreign[-1]  # only like is compared with like


def test_other_options_and_machines_are_named(tmp_path):
    for seed, changes in enumerate(({}, {"device_name": "Abacus"}, {"precision": "mixed"})):
        made_up_run(tmp_path / "run", LINEAR, seed, **changes)
        collect(tmp_path / "run", tmp_path)
    text = render([LINEAR], read_results(tmp_path))
    plain, mixed = sorted(rows(text, "linear"), key=lambda cells: "(n = 1)" in cells[4])
    assert plain[7] == "1.3 min A, 1.3 min B" or plain[7] == "1.3 min B, 1.3 min C"
    assert "(n = 1)" in mixed[4]
    assert "Abacus, 1 thread" in text and "`--precision mixed`" in text


def test_a_reference_stands_apart_and_only_where_it_has_something(tmp_path):
    ours = measured(tmp_path, seeds=2)
    (authors,) = references(ROOT)
    text = render(ROWS, ours, [authors, as_reference("ours", "here", ours)])
    mnist, svhn, cifar = text.split("| data set")[1:]
    assert "authors' code, %" in mnist and "authors" not in svhn + cifar
    cells = rows(mnist, "linear pcDEQ-1 | tanh")[0]
    assert cells[8] == "97.99 ± 0.15 (n = 3)"
    assert cells[9] == compare([result.test_acc[-1] for result in ours], [98.14, 97.85, 97.98])
    assert cells[10] == cells[4] and re.fullmatch(
        r"\+0.00 \(-(\d.\d\d) to \+\1\), no difference seen", cells[11]
    )
    assert rows(mnist, "multi conv pcDEQ-1 | softsign")[0][8:10] == ["99.16 (n = 1)", ""]
    assert "A reference, not a result of this project." in mnist


def test_durations():
    shown = [duration(seconds) for seconds in (0.4, 45, 75, 59 * 60, 5400)]
    assert shown == ["0 s", "45 s", "1.2 min", "59 min", "1.5 h"]


def test_parameters():
    assert parameter_count(RECIPES["cifar_multi_conv_pcdeq_2_sigmoid"]) == 130950


def test_text_goes_between_the_markers_and_nowhere_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for changed in (True, False):
        assert write_between(readme, "new ±\n") == changed
        assert readme.read_text(encoding="utf-8") == f"before\n{BEGIN}\nnew ±\n{END}\nafter\n"
    twice = f"{BEGIN}\na\n{END}\n" * 2
    for damaged in (f"{END}\n{BEGIN}", BEGIN, "nothing", twice, f"{END}{BEGIN}\na\n{END}"):
        readme.write_text(damaged)
        with pytest.raises(RunError, match="lacks the one pair of markers"):
            write_between(readme, "new")
        assert readme.read_text() == damaged


def test_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    made = render(ROWS, read_results(ROOT / "results"), references(ROOT))
    assert shown.strip() == made.strip(), "python reproduce.py --table writes them"
