"""Checkpoints: what loads, and what is refused with a reason."""

import pytest
import torch
from checkpoints import authors, ours, perturbed, refusal, same
from torch import Tensor, nn

from pcdeq import CheckpointError, build_network, load_network, load_weights
from pcdeq.weights import describe, read_checkpoint

MODELS = [
    ("linear_pcdeq_1", "softsign"),
    ("single_conv_pcdeq_2", "sigmoid"),
    ("multi_conv_pcdeq_1", "relu6", "cifar"),
    ("multi_conv_pcdeq_1", "tanh", "svhn", False, 4),
]
every_model = pytest.mark.parametrize("arguments", MODELS, ids=["-".join(m[:2]) for m in MODELS])


@every_model
@pytest.mark.parametrize("save", [ours, authors])
def test_weights_come_back(arguments, save, tmp_path):
    model = perturbed(*arguments)
    path = save(model, tmp_path / "best.pth")
    fresh = build_network(*arguments)
    load_weights(fresh, path)
    assert same(fresh, model)
    load_weights(fresh, str(path))  # a name will do


@every_model
def test_a_network_comes_back_from_its_file_alone(arguments, tmp_path):
    model = perturbed(*arguments)
    path = ours(model, tmp_path / "best.pth", training={"epoch": 3, "losses": [1.0, 0.5]})
    loaded = load_network(path, solver="anderson", max_iter=50)
    assert same(loaded, model) and describe(loaded) == describe(model)
    assert not loaded.training
    assert all(b.deq.solver == "anderson" and b.deq.max_iter == 50 for b in loaded.blocks)
    x = torch.rand(2, *(1, 28, 28) if model.dataset == "mnist" else (3, 32, 32))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-3, atol=1e-3)


@every_model
def test_the_authors_network_comes_back_when_named(arguments, tmp_path):
    model = perturbed(*arguments)
    path = authors(model, tmp_path / "authors.pth")
    loaded = load_network(path, model.name, model.activation, model.dataset)
    assert same(loaded, model) and describe(loaded) == describe(model)  # classes from the file


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("save", [ours, authors])
def test_weights_that_are_not_finite_are_refused(value, save, tmp_path):
    model = build_network("linear_pcdeq_1", "tanh")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    broken = build_network("linear_pcdeq_1", "tanh")
    broken.block.deq.f.W.weight_v.data[3, 5] = value
    path = save(broken, tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=r"block\.deq\.f\.W\.weight_v is not finite"):
        load_weights(model, path)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("save", [ours, authors])
def test_weights_that_are_finite_in_another_dtype_alone_are_refused(save, tmp_path):
    model = build_network("linear_pcdeq_1", "tanh")
    broken = build_network("linear_pcdeq_1", "tanh").double()
    broken.classifier.bias.data[3] = 1e300
    with pytest.raises(CheckpointError, match=r"classifier\.bias is not finite in float32"):
        load_weights(model, save(broken, tmp_path / "best.pth"))
    whole = {k: v.long() if k == "classifier.bias" else v for k, v in model.state_dict().items()}
    torch.save(whole, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"its classifier\.bias holds whole numbers$"):
        load_weights(model, tmp_path / "whole.pth")


def test_the_augmented_network(tmp_path):
    model = perturbed("multi_conv_pcdeq_2", "sigmoid", "cifar", augment=True)
    assert describe(load_network(ours(model, tmp_path / "a"))) == describe(model)
    with pytest.raises(CheckpointError, match="it was trained with augmentation"):
        load_network(tmp_path / "a", augment=False)
    with pytest.raises(CheckpointError, match="it was trained without augmentation"):
        load_network(ours(perturbed(), tmp_path / "c"), augment=True)
    path = authors(model, tmp_path / "b")
    assert same(load_network(path, "multi_conv_pcdeq_2", "sigmoid", "cifar", augment=True), model)
    with pytest.raises(CheckpointError, match="another shape"):
        load_network(path, "multi_conv_pcdeq_2", "sigmoid", "cifar")


def test_a_checkpoint_is_tensors_and_plain_values(tmp_path):
    model = perturbed()
    content = read_checkpoint(ours(model, tmp_path / "best.pth"))
    assert {k: v for k, v in content.items() if k != "model"} == {
        "network": "linear_pcdeq_1",
        "activation": "tanh",
        "dataset": "mnist",
        "augment": False,
        "classes": 10,
    }
    assert all(isinstance(v, Tensor) and v.device.type == "cpu" for v in content["model"].values())


def test_a_float64_network_takes_float32_weights(tmp_path):
    model = perturbed()
    double = build_network("linear_pcdeq_1", "tanh").double()
    load_weights(double, ours(model, tmp_path / "best.pth"))
    assert double.classifier.weight.dtype == torch.float64
    assert same(double.float(), model)


# Another network


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("linear_pcdeq_2", "sigmoid"), "linear_pcdeq_2 with sigmoid for mnist, 10 classes"),
        (("linear_pcdeq_1", "relu6"), "linear_pcdeq_1 with relu6 for mnist, 10 classes"),
        (("multi_conv_pcdeq_1", "tanh"), "multi_conv_pcdeq_1 with tanh for mnist, 10 classes"),
        (("linear_pcdeq_1", "tanh", "mnist", False, 7), "with tanh for mnist, 7 classes"),
        (("multi_conv_pcdeq_1", "tanh", "cifar", True), "for cifar with augmentation, 10 classes"),
    ],
)
def test_another_network_is_refused_and_both_are_named(arguments, named, tmp_path):
    sentence = refusal(ours(perturbed(*arguments), tmp_path / "best.pth"))
    assert named in sentence
    assert "linear_pcdeq_1 with tanh for mnist, 10 classes" in sentence


def test_another_data_set_of_equal_shapes_is_refused(tmp_path):
    path = ours(perturbed("single_conv_pcdeq_1", "tanh", "svhn"), tmp_path / "best.pth")
    sentence = refusal(path, build_network("single_conv_pcdeq_1", "tanh", "cifar"))
    assert "for svhn" in sentence and "for cifar" in sentence


@pytest.mark.parametrize(
    "arguments, what",
    [
        (("single_conv_pcdeq_1", "tanh"), "it lacks linear1.bias and 1 more"),
        (("linear_pcdeq_1", "tanh", "mnist", False, 7), "another shape of classifier.bias"),
    ],
)
def test_the_authors_files_are_refused_where_keys_or_shapes_differ(arguments, what, tmp_path):
    path = authors(perturbed(*arguments), tmp_path / "authors.pth")
    sentence = refusal(path)
    assert "linear_pcdeq_1 with tanh for mnist" in sentence
    assert what in sentence


def test_the_authors_files_do_not_say_their_variant(tmp_path):
    model = perturbed("linear_pcdeq_2", "sigmoid")
    load_weights(build_network("linear_pcdeq_1", "tanh"), authors(model, tmp_path / "a.pth"))


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_foreign_and_missing_keys_are_named(change, tmp_path):
    state = perturbed().state_dict()
    if change == "more":
        state |= {"bn9.weight": torch.ones(3), "bn9.bias": torch.ones(3)}
    else:
        del state["bn2.weight"]
    torch.save(state, tmp_path / "authors.pth")
    sentence = refusal(tmp_path / "authors.pth")
    expected = "has an unknown bn9.bias and 1 more" if change == "more" else "lacks bn2.weight"
    assert sentence.endswith(expected)


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({"network": "linear_pcdeq_2"}, "its network is not linear_pcdeq_2"),
        ({"activation": "relu6"}, "its activation is not relu6"),
        ({"dataset": "cifar"}, "its dataset is not cifar"),
        ({"augment": True}, "it was trained without augmentation"),
    ],
)
def test_load_network_refuses_what_contradicts_the_file(asked, sentence, tmp_path):
    path = ours(perturbed(), tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=sentence):
        load_network(path, **asked)
    assert load_network(path, "linear_pcdeq_1", "tanh", "mnist", augment=False)


def test_load_network_says_what_a_plain_state_dict_does_not(tmp_path):
    path = authors(perturbed(), tmp_path / "authors.pth")
    with pytest.raises(CheckpointError, match="its network, activation, dataset: name"):
        load_network(path)
    with pytest.raises(CheckpointError, match=r"does not say its dataset: name"):
        load_network(path, "linear_pcdeq_1", "tanh")
    with pytest.raises(CheckpointError, match=r"no network of this collection.*sigmoid"):
        load_network(path, "linear_pcdeq_1", "sigmoid", "mnist")


def test_a_wrong_solver_option_is_not_the_files_fault(tmp_path):
    path = ours(perturbed(), tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"^unknown solver 'andersen'") as error:
        load_network(path, solver="andersen")
    assert not isinstance(error.value, CheckpointError)


STATE = {"a": torch.ones(2)}
LINEAR = {"network": "linear_pcdeq_1", "activation": "tanh", "dataset": "mnist", "augment": False}


def test_state_dicts_in_other_wrappings_are_told_how_to_come(tmp_path):
    state, path = perturbed().state_dict(), tmp_path / "theirs.pth"
    for content, sentence in (
        ({"state_dict": state, "epoch": 3}, "more than its state_dict: save that alone"),
        ({f"module.{key}": value for key, value in state.items()}, r"state dict of its \.module"),
        ({"model": state}, "save its 'model' alone, as a plain state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=sentence):
            load_network(path, "linear_pcdeq_1", "tanh", "mnist")


@pytest.mark.parametrize(
    "identity",
    [
        {},
        {**LINEAR},
        {**LINEAR, "classes": "10"},
        {**LINEAR, "classes": torch.tensor([1, 2])},
        {**LINEAR, "classes": 10**13},
        {**LINEAR, "classes": True},
        {**LINEAR, "classes": 10, "network": ["linear_pcdeq_1"]},
        {**LINEAR, "classes": 10, "network": "resnet18"},
        {**LINEAR, "classes": 10, "dataset": {}},
        {**LINEAR, "classes": 10, "augment": "no"},
        {**LINEAR, "classes": 10, "class_names": ["cat", "dog"]},
        {**LINEAR, "classes": 10, "class_names": [0] * 10},
        {**LINEAR, "classes": 10, "class_names": 10},
    ],
)
def test_an_identity_that_is_none_is_refused(identity, tmp_path):
    path = tmp_path / "best.pth"
    torch.save({**identity, "model": perturbed().state_dict()}, path)
    refusal(path)
    with pytest.raises(CheckpointError, match=r"best\.pth"):
        load_network(path)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        7,
        {"model": 7},
        {"model": {"a": 7}},
        {"a": torch.ones(2), "b": "text"},
        {1: torch.ones(2), "a": torch.ones(2)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(2, dtype=torch.uint8)},
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    assert "no checkpoint" in refusal(tmp_path / "file.pth")


@pytest.mark.parametrize("content", [{}, STATE, {"classifier.weight": torch.tensor(1.0)}])
def test_a_state_dict_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    assert "for another network" in refusal(tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no classifier"):
        load_network(tmp_path / "file.pth", "linear_pcdeq_1", "tanh", "mnist")


def test_a_model_of_one_s_own_is_told_how_it_loads():
    with pytest.raises(TypeError, match="not for Linear: a model of one's own has its load_state"):
        load_weights(nn.Linear(2, 2), "best.pth")
