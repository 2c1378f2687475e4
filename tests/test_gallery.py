"""plot.py: a folder gets its curves, a checkpoint its convergence and what is proved of it."""

import shutil

import pytest
import torch
from made_up import made_up_run

from pcdeq import CheckpointError, build_network
from pcdeq.experiments.errors import RunError
from pcdeq.experiments.gallery import main
from pcdeq.experiments.results import RECIPES

LINEAR = RECIPES["mnist_linear_pcdeq_1_tanh"]


def test_runs_and_checkpoints_get_their_figures(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    made_up_run(run, LINEAR, ran=3)
    shutil.copy(run / "best.pth", tmp_path / "named.pth")
    words = [str(run), str(run / "last.pth"), str(tmp_path / "named.pth"), "-o", str(out)]
    main([*words, "--sample", "--eps", "0.01", "--first", "20"])
    names = ["curves", "iterations"]
    names += [f"{n}_{k}" for n in ("run_last", "named") for k in ("convergence", "robustness")]
    assert capsys.readouterr().out.split() == [str(out / f"{name}.png") for name in names]
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{ending}" for name in names for ending in ("png", "pdf")
    }


def test_a_plain_state_dict_is_drawn_when_its_network_is_named(tmp_path):
    model = build_network("linear_pcdeq_1", "softsign")
    torch.save(model.state_dict(), tmp_path / "authors.pth")
    words = [str(tmp_path / "authors.pth"), "-o", str(tmp_path), "--sample"]
    with pytest.raises(CheckpointError, match="plain state dict"):
        main(words)
    main([*words, "-net", "linear_pcdeq_1", "-activ", "softsign", "--dataset", "mnist"])
    assert (tmp_path / "authors_convergence.png").exists()


def test_a_missing_checkpoint_is_named_before_anything_is_drawn(tmp_path):
    made_up_run(tmp_path / "run", LINEAR)
    paths = [str(tmp_path / "run"), str(tmp_path / "nothing.pth")]
    with pytest.raises(CheckpointError, match="nothing"):
        main([*paths, "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_two_checkpoints_of_one_name_are_not_drawn_over_each_other(tmp_path):
    for place in ("a", "b"):
        made_up_run(tmp_path / place / "run", LINEAR)
    paths = [str(tmp_path / place / "run/last.pth") for place in ("a", "b")]
    main([paths[0], paths[0], "-o", str(tmp_path / "one"), "--sample"])  # the same one, once
    with pytest.raises(RunError, match=r"a/run/last\.pth and .*b/run/last\.pth would be drawn"):
        main([*paths, "-o", str(tmp_path / "out"), "--sample"])
    assert not (tmp_path / "out").exists()


def test_two_folders_of_one_name_are_not_drawn_over_each_other(tmp_path):
    for place in ("a", "b"):
        made_up_run(tmp_path / place / "run", LINEAR)
    with pytest.raises(RunError, match=r"a/run and .*b/run would be drawn"):
        main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "-o", str(tmp_path / "out")])


def test_where_no_figure_can_be_written_is_said_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nothing.pth"), "-o", str(tmp_path / "file" / "figures")])
    assert stop.value.code == 2 and "file is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run"],
        ["run", "-o", "x", "--eps", "-1"],
        [".", "-o", "x", "--eps", "1"],
        ["x.pth", "-o", "x", "-net", "linear_pcdeq_1", "-activ", "sigmoid", "--dataset", "mnist"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
