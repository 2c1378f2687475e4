"""reproduce.py: what it lists, runs, takes in and renders, and what it says of the rest."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import made_up_run

from pcdeq.experiments import genuine, reproduce
from pcdeq.experiments.errors import DataError, RunError
from pcdeq.experiments.recipes import ROWS
from pcdeq.experiments.reproduce import main
from pcdeq.experiments.results import RECIPES, collect, read_results

ROOT = Path(__file__).resolve().parents[1]
LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]


def call(capsys, *words: str) -> str:
    main(ROOT, words)
    return capsys.readouterr().out


def test_the_list_is_one_training_command_per_missing_run(tmp_path, capsys):
    empty = tmp_path / "none"
    commands = call(capsys, "all", "--results", str(empty), "--seeds", "1", "--list").splitlines()
    assert len(commands) == len(set(commands)) == 32
    assert not empty.exists()
    for command, recipe in zip(commands, ROWS, strict=True):
        words = shlex.split(command)
        assert Path(words[1]).resolve() == ROOT / f"train_{recipe.dataset}.py"
        assert words[-2:] == [str(empty / "runs" / f"{recipe.name}_seed0"), "--resume"]
        assert ("--aug" in words) == recipe.augment
    made_up_run(tmp_path / "run", LINEAR, seed=1)
    collect(tmp_path / "run", tmp_path)
    made_up_run(tmp_path / "run", LINEAR, seed=0, ran=3)  # cut short: is run whole
    collect(tmp_path / "run", tmp_path)
    listed = call(
        capsys,
        "mnist",
        "--rows",
        "linear*tanh",
        "--seeds",
        "3",
        "--list",
        "--results",
        str(tmp_path),
        "--precision",
        "mixed",
        "--data-root",
        "a b",
    )
    seeds = [shlex.split(line)[7] for line in listed.splitlines()]
    assert seeds == ["0", "2"]
    assert "--data-root 'a b' --precision mixed" in listed


def test_the_first_line_of_the_list_is_enough_for_head(tmp_path):
    command = f"{shlex.quote(sys.executable)} reproduce.py all --results {tmp_path} --list"
    done = subprocess.run(
        f"{command} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_nothing_to_do_is_said(tmp_path, capsys):
    for seed in range(2):
        made_up_run(tmp_path / "run", LINEAR, seed)
        collect(tmp_path / "run", tmp_path)
    words = ("mnist", "--rows", "mnist_linear_pcdeq_1_tanh", "--seeds", "2")
    main(ROOT, [*words, "--results", str(tmp_path), "--list"])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nothing to do: ")  # what reads the list gets no sentence
    said = call(
        capsys, "mnist", "--rows", "linear*tanh", "--seeds", "2", "--results", str(tmp_path)
    )
    assert said.startswith(f"nothing to do: {tmp_path} holds all 2 results of 1 row(s); ")


def test_what_is_held_with_other_options_is_named(tmp_path, capsys):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    asked = ["mnist", "--rows", "linear*tanh", "--seeds", "2", "--list", "--results", str(tmp_path)]
    main(ROOT, asked)
    assert capsys.readouterr().err == ""
    main(ROOT, [*asked, "--solver", "anderson"])
    said = "note: mnist_linear_pcdeq_1_tanh, seed 0, is held with the default options: "
    assert capsys.readouterr().err == said + "a table averages seeds of the same options only\n"


def test_missing_seeds_are_run_as_those_that_are_there(tmp_path, capsys):
    for seed, options in enumerate(({"solver": "anderson"}, {"solver": "anderson"}, {})):
        made_up_run(tmp_path / "run", LINEAR, seed, **options)
        collect(tmp_path / "run", tmp_path)
    asked = ["mnist", "--rows", "linear_pcdeq_1_*", "--seeds", "4", "--results", str(tmp_path)]
    main(ROOT, [*asked, "--list"])
    said = capsys.readouterr()
    with_solver = [line for line in said.out.splitlines() if "--solver anderson" in line]
    assert len(with_solver) == 1 and "-activ tanh --seed 3" in with_solver[0]
    assert "seed 2, is held with the default options" in said.err and "seed 0" not in said.err
    for flags in (["--tol", "1e-3"], ["--solver", "picard"]):  # said otherwise
        main(ROOT, [*asked, "--list", *flags])
        said = capsys.readouterr()
        assert "anderson" not in said.out
        assert said.out.count("--tol 0.001") == 9 * ("--tol" in flags)
        assert said.err.count("is held with --solver anderson") == 2


def test_runs_from_elsewhere_are_taken_in_with_their_weights(tmp_path, capsys):
    made_up_run(tmp_path / "there/a", LINEAR)
    made_up_run(tmp_path / "there/b", LINEAR, device_name="Abacus")
    made_up_run(tmp_path / "there/c", LINEAR, seed=1, ran=7)
    mine = tmp_path / "mine"
    with pytest.raises(RunError, match="1 of 3 runs were not taken in"):
        main(ROOT, ["--collect", str(tmp_path / "there"), "--results", str(mine)])
    said = capsys.readouterr()
    assert "another run of this row and seed" in said.err
    assert "% after 7 of 40 epochs" in said.out and said.out.count("after") == 1
    assert [result.seed for result in read_results(mine)] == [0, 1]
    assert [path.name for path in (mine / "weights").glob("*.pth")] == [f"{LINEAR.name}.pth"]


def test_someone_elses_results_stand_beside_the_repositorys(tmp_path, capsys):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    before = (ROOT / "README.md").read_bytes()
    shown = call(capsys, "--table", "--rows", "linear*tanh", "--results", str(tmp_path))
    assert "Slide rule" in shown and "authors' code, %" in shown
    assert (ROOT / "README.md").read_bytes() == before


@pytest.mark.parametrize("what", ["--table", "--figures"])
def test_a_folder_without_results_is_an_error(tmp_path, what):
    with pytest.raises(RunError, match="holds no results"):
        main(ROOT, [what, "--results", str(tmp_path / "none")])


def test_figures_are_of_the_rows_that_were_asked_for(tmp_path, capsys):
    made_up_run(tmp_path / "run", LINEAR)
    collect(tmp_path / "run", tmp_path)
    words = ["--figures", "--results", str(tmp_path)]
    with pytest.raises(RunError, match="no whole run of these rows"):
        main(ROOT, ["svhn", *words])
    assert "mnist_accuracy.png" in call(capsys, "mnist", *words)
    made_up_run(tmp_path / "short", LINEAR, ran=1)
    collect(tmp_path / "short", tmp_path / "few")
    with pytest.raises(RunError, match="no whole run of these rows"):
        main(ROOT, ["--figures", "--results", str(tmp_path / "few")])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["cifar10"],
        ["mnist", "--rows", "linaer*"],
        ["mnist", "--jobs", "0"],
        ["mnist", "--seeds", "x"],
        ["mnist", "--list", "--table"],
        ["mnist", "--solver", "newton"],
        ["mnist", "--tol", "-1"],
        ["--collect"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(ROOT, words)
    assert stop.value.code == 2
    assert "usage: reproduce.py" in capsys.readouterr().err


def test_a_run_begun_with_other_options_is_said_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run_all", lambda *_: pytest.fail("a run was begun"))
    monkeypatch.setattr(reproduce, "_fetch", lambda *_: pytest.fail("data were downloaded"))
    made_up_run(tmp_path / "runs" / f"{LINEAR.name}_seed1", LINEAR, 1, ran=3, solver="anderson")
    words = ["mnist", "--rows", "linear*tanh", "--seeds", "2", "--results", str(tmp_path)]
    for command in (words, [*words, "--list"]):
        with pytest.raises(
            RunError, match=r"with the same flags, but: --solver picard.*; name what"
        ):
            main(ROOT, command)
    monkeypatch.setattr(reproduce, "_fetch", lambda *_: None)
    monkeypatch.setattr(reproduce, "run_all", lambda jobs, *_: [])
    main(ROOT, [*words, "--solver", "anderson"])


def test_a_pattern_without_a_star_is_told_of_it(capsys):
    with pytest.raises(SystemExit):
        main(ROOT, ["mnist", "--rows", "linear"])
    assert "no row matches 'linear' (is '*linear*' meant?); rows are" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # SVHN has none
        main(ROOT, ["svhn", "--rows", "linear"])
    assert "no row matches 'linear'; rows are svhn" in capsys.readouterr().err


def test_absent_data_is_said_once_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run_all", lambda *_: pytest.fail("a run was begun"))
    monkeypatch.setattr(genuine, "SOURCES", {"mnist": lambda root: root})

    def absent(source):
        raise DataError(f"MNIST is not in {source}")

    monkeypatch.setattr(genuine, "genuine", absent)
    words = ["mnist", "--results", str(tmp_path), "--data-root", str(tmp_path / "data")]
    with pytest.raises(DataError, match=r"MNIST is not in .*data"):
        main(ROOT, words)
