"""The README's commands: which are found, what is shortened, and that each is one."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pcdeq.experiments import gallery, report, reproduce
from pcdeq.experiments.cli import parse

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "readme_blocks.py"

tool = SimpleNamespace(**runpy.run_path(str(TOOL)))

DOCUMENT = """\
# Title
```bash
pip install -r requirements.txt
python train_mnist.py -net linear_pcdeq_1 -epochs 10
```
Words, `code`, and
```text
python train_cifar.py -net multi_conv_pcdeq_1 --device cuda
```
````bash
echo '```python'
```
python evaluate.py last.pth
````
```bash
python train_svhn.py -net single_conv_pcdeq_1   # two days
```
1. in a list
   ~~~python
   for i in range(3):
       print(i)

   print("python train_mnist.py -epochs 3")
   ~~~
```bibtex
@inproceedings{pcdeq}
```
"""


def test_blocks_are_found_with_their_languages_and_lines():
    found = tool.blocks(DOCUMENT)
    assert [(block.language, block.line) for block in found] == [
        ("bash", 2), ("text", 7), ("bash", 10), ("bash", 15), ("python", 19), ("bibtex", 25),
    ]  # fmt: skip
    assert found[2].text == "echo '```python'\n```\npython evaluate.py last.pth\n"
    assert found[4].text.startswith("for i in range(3):\n    print(i)\n\nprint(")


def test_bash_and_python_become_scripts_and_the_first_two_of_bash_stay_as_written():
    made = tool.scripts(DOCUMENT)
    assert list(made) == ["01.bash", "02.bash", "03.bash", "04.py"]
    assert made["01.bash"].endswith("-net linear_pcdeq_1 -epochs 10\n")
    assert made["02.bash"].endswith("python evaluate.py last.pth\n")
    assert "-epochs 1 --sample -net single_conv_pcdeq_1 " in made["03.bash"]
    assert made["04.py"].endswith('print("python train_mnist.py -epochs 3")\n')


@pytest.mark.parametrize("language", ["", "sh", "console", "py", "bash title=x", "Bash"])
def test_a_fence_that_would_be_passed_over_is_refused(language):
    with pytest.raises(ValueError, match="line 3: fenced as"):
        tool.blocks(f"a\n\n```{language}\npython train_mnist.py\n```\n")


def test_a_block_without_end_is_refused():
    with pytest.raises(ValueError, match="line 2: the block has no end"):
        tool.blocks("a\n````bash\necho\n```\n")


@pytest.mark.parametrize(
    "written, run",
    [
        (
            "python train_mnist.py -net linear_pcdeq_1 -epochs 40 -m 30",
            "python train_mnist.py -epochs 1 --sample -net linear_pcdeq_1 -m 30",
        ),
        (
            "python train_cifar.py -net multi_conv_pcdeq_1 --aug \\\n    --epochs=120 | tee log",
            "python train_cifar.py -epochs 1 --sample -net multi_conv_pcdeq_1 --aug      | tee log",
        ),
        (
            "python train_cifar.py --image-folder 'my images' -net single_conv_pcdeq_2",
            "python train_cifar.py -epochs 1 --sample -net single_conv_pcdeq_2",
        ),
        (
            "torchrun --nproc-per-node 2 train_mnist.py -net linear_pcdeq_1 --sample",
            "torchrun --nproc-per-node 2 train_mnist.py -epochs 1 --sample -net linear_pcdeq_1 "
            "--sample",
        ),
        (
            "python evaluate.py runs/mnist_linear_pcdeq_1_tanh_seed0/best.pth --certify",
            "python evaluate.py --sample runs/mnist_linear_pcdeq_1_tanh_sample_seed0/best.pth "
            "--certify",
        ),
        (
            "python plot.py runs/cifar_x_aug_seed12 runs/a_sample_seed0 runs/b_folder_seed1 -o out",
            "python plot.py --sample runs/cifar_x_aug_sample_seed12 runs/a_sample_seed0 "
            "runs/b_sample_seed1 -o out",
        ),
        (
            "python benchmarks/benchmark.py --rounds 20 --rows '*linear*'",
            "python benchmarks/benchmark.py --rounds 1 --rows '*linear*'",
        ),
        (
            "python reproduce.py mnist --rows='linear*' --jobs 2  # four rows, a night",
            "python reproduce.py mnist --rows='linear*' --jobs 2 --results \"$(mktemp -d)\" --list "
            "| sed -n '1s/$/ -epochs 1 --sample/p' | sh  # four rows, a night",
        ),
    ],
)
def test_what_is_long_is_shortened_and_what_needs_data_takes_the_sample(written, run):
    assert tool.shortened(written + "\n") == run + "\n"


@pytest.mark.parametrize(
    "commands",
    [
        "python -m pytest -q\npip install .\n",
        "python reproduce.py --table --results mine\npython reproduce.py --figures\n",
        "python reproduce.py all --list | head -1\n",
        "ls runs/first weights/mnist_linear_pcdeq_1_tanh.pth\n",
    ],
)
def test_what_is_short_stays_as_written(commands):
    assert tool.shortened(commands) == commands


@pytest.mark.parametrize(
    "command",
    [
        "python train_mnist.py -net multi_conv_pcdeq_2 -epochs 40 --out x",
        "python train_cifar.py -net multi_conv_pcdeq_1 --aug --image-folder images",
        "python evaluate.py best.pth --image-folder images --eps 0.01 0.02",
        "python plot.py best.pth --image-folder images -o out",
    ],
)
def test_a_shortened_command_means_the_sample_to_its_program(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the clone may hold such a run
    _, script, *flags = shlex.split(tool.shortened(command))
    if script.startswith("train"):
        dataset = script[len("train_") : -len(".py")]
        config = parse(dataset, flags, augmentation=dataset == "cifar")
        assert config.epochs == 1 and config.out == ("x" if "x" in flags else None)
    else:
        parser = {"evaluate.py": report, "plot.py": gallery}[script]._parser()
        config = parser.parse_args(flags)
    assert config.sample and config.image_folder is None


def test_the_first_command_of_a_list_is_one_short_training(tmp_path, capsys):
    command = tool.shortened("python reproduce.py mnist --rows '*relu6' --jobs 2")
    listing, append, _ = command.split(" | ")
    flags = [word for word in shlex.split(listing)[2:] if "mktemp" not in word]
    flags.insert(flags.index("--results") + 1, str(tmp_path))
    reproduce.main(ROOT, flags)
    lines = subprocess.run(
        append, shell=True, input=capsys.readouterr().out, capture_output=True, text=True
    ).stdout
    _, script, *flags = shlex.split(lines)
    config = parse(Path(script).stem.removeprefix("train_"), flags)
    assert (config.activation, config.epochs, config.sample) == ("relu6", 1, True)
    assert lines.count("\n") == 1


def test_each_block_of_the_readme_is_a_script():
    for name, script in tool.scripts((ROOT / "README.md").read_text(encoding="utf-8")).items():
        assert script.strip(), name
        if name.endswith(".py"):
            compile(script, f"README.md, block {name}", "exec")
        else:
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_program_writes_them(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(DOCUMENT)
    subprocess.run([sys.executable, TOOL, readme, tmp_path / "out"], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert made == tool.scripts(DOCUMENT)
    readme.write_text("```\nls\n```\n")
    command = [sys.executable, TOOL, readme, tmp_path / "other"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and not (tmp_path / "other").exists()
    assert refused.stderr.startswith(f"{readme}, line 1: fenced as ''")
    assert refused.stderr.count("\n") == 1
