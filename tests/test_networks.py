"""The six networks: what they are made of, what they refuse, and what their options do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcdeq
from pcdeq import NETWORKS, build_network, networks
from pcdeq.activations import ACTIVATIONS, allowed
from pcdeq.networks import DATASETS, Flatten, Network, check_network, variant_of

# network without its variant, data set, augment, channels of the blocks, parameters
TABLE = [
    ("linear", "mnist", False, (80,), 70_410),
    ("single_conv", "mnist", False, (82,), 69_136),
    ("multi_conv", "mnist", False, (12, 24, 48), 41_278),
    ("single_conv", "svhn", False, (125,), 164_760),
    ("single_conv", "cifar", False, (125,), 164_760),
    ("multi_conv", "svhn", False, (20, 50, 80), 130_950),
    ("multi_conv", "cifar", False, (20, 50, 80), 130_950),
    ("multi_conv", "cifar", True, (100, 120, 140), 661_470),
]
ids = [f"{n}-{d}" + ("-aug" if a else "") for n, d, a, *_ in TABLE]
every_row = pytest.mark.parametrize("net, dataset, augment, sizes, parameters", TABLE, ids=ids)
both_variants = pytest.mark.parametrize("variant", [1, 2])


def small(name: str = "linear_pcdeq_1", **options) -> Network:
    return build_network(name, allowed(variant_of(name))[0], **options)


@every_row
@both_variants
def test_sizes_are_those_of_the_paper(net, dataset, augment, sizes, parameters, variant):
    name = f"{net}_pcdeq_{variant}"
    for activation in allowed(variant):
        model = build_network(name, activation, dataset, augment)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert tuple(len(b.deq.f.W.weight_g) for b in model.blocks) == sizes
        assert all(b.activation is ACTIVATIONS[activation] for b in model.blocks)
        described = (model.name, model.activation, model.dataset, model.augment, model.classes)
        assert described == (name, activation, dataset, augment, 10)


@every_row
@both_variants
def test_children_stand_in_the_order_of_the_forward_pass(
    net, dataset, augment, sizes, parameters, variant
):
    model = build_network(f"{net}_pcdeq_{variant}", allowed(variant)[0], dataset, augment)
    passed = []
    for name, child in model.named_children():
        child.register_forward_hook(lambda *_, name=name: passed.append(name))
    out = model(torch.rand(2, *DATASETS[dataset]))
    assert out.shape == (2, 10)
    assert passed == [name for name, _ in model.named_children()]
    assert [n for n in passed if n.startswith("block")] == [
        n for n, child in model.named_children() if child in model.blocks
    ]


@pytest.mark.parametrize(
    "name, children",
    [
        ("linear_pcdeq_2", "flatten linear1 bn1 block bn2 classifier"),
        ("single_conv_pcdeq_1", "conv1 bn1 block maxpool bn2 avgpool flatten classifier"),
        (
            "multi_conv_pcdeq_1",
            "conv1 bn1 block1 maxpool1 bn2 downsample1 bn3 block2 maxpool2 bn4 "
            "downsample2 bn5 block3 maxpool3 bn6 avgpool flatten classifier",
        ),
    ],
)
def test_names_of_children(name, children):
    assert " ".join(n for n, _ in small(name).named_children()) == children


def test_six_names_each_a_builder():
    assert list(NETWORKS) == [
        f"{net}_pcdeq_{variant}"
        for net in ("linear", "single_conv", "multi_conv")
        for variant in (1, 2)
    ]
    for name, build in NETWORKS.items():
        assert build.__name__ == name and getattr(networks, name) is build and build.__doc__
        assert variant_of(name) == ACTIVATIONS[build().activation].variant
        assert build().activation == ("tanh" if variant_of(name) == 1 else "sigmoid")


@pytest.mark.parametrize("name", NETWORKS)
def test_one_seed_one_network(name):
    torch.manual_seed(5)
    first = small(name).state_dict()
    torch.manual_seed(5)
    second, third = small(name).state_dict(), small(name).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], third[k]) for k in first)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("linear", "tanh"), r"unknown network 'linear': choose from linear_pcdeq_1, .*multi_conv"),
        (("linear_pcdeq_1", "sigmoid"), r"'sigmoid': choose from tanh, softsign, relu6"),
        (("multi_conv_pcdeq_2", "relu6"), r"'relu6': choose from sigmoid$"),
        (("multi_conv_pcdeq_2", "gelu"), r"'gelu': choose from sigmoid$"),
        (
            ("single_conv_pcdeq_1", "tanh", "imagenet"),
            r"'imagenet'.*mnist, svhn, cifar",
        ),
        (("linear_pcdeq_1", "tanh", "svhn"), r"mnist only.*svhn"),
        (("linear_pcdeq_1", "tanh", "cifar", True), r"mnist only"),
        (("single_conv_pcdeq_1", "tanh", "cifar", True), r"augmentation.*single_conv_pcdeq_1"),
        (("multi_conv_pcdeq_1", "tanh", "svhn", True), r"augmentation.*svhn"),
    ],
)
def test_what_is_no_network_of_the_paper_is_refused(arguments, message):
    arguments = (*arguments, "mnist")[:3] + arguments[3:]
    for refuse in (build_network, check_network):
        with pytest.raises(ValueError, match=message) as error:
            refuse(*arguments)
        assert "\n" not in str(error.value)
    if arguments[0] in NETWORKS:
        with pytest.raises(ValueError, match=message):
            NETWORKS[arguments[0]](*arguments[1:])


@pytest.mark.parametrize("classes", [1, 0, -3, 2.5, "10", None])
def test_a_classifier_of_fewer_than_two_classes_is_refused(classes):
    with pytest.raises(ValueError, match=f"at least 2 classes, not {classes!r}"):
        small(classes=classes)


def test_names_that_are_no_text_are_unknown():
    with pytest.raises(ValueError, match="unknown network"):
        build_network(["linear_pcdeq_1"], "tanh")
    with pytest.raises(ValueError, match="unknown data set"):
        build_network("linear_pcdeq_1", "tanh", ["mnist"])


def test_wrong_solver_options_are_refused():
    with pytest.raises(ValueError, match="'newton'"):
        small(solver="newton")
    with pytest.raises(TypeError, match="speed"):
        small(speed="high")


def test_options_reach_every_block():
    options = {"solver": "anderson", "precision": "mixed", "tol": 1e-3, "max_iter": 7}
    model = small("multi_conv_pcdeq_1", **options)
    assert len(model.blocks) == 3
    for block in model.blocks:
        assert {key: getattr(block.deq, key) for key in options} == options


@pytest.mark.parametrize("classes", [2, 17])
def test_classes(classes):
    model = small(classes=classes)
    assert model.classes == classes
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, classes)


def test_clamp_projects_all_blocks():
    model = small("multi_conv_pcdeq_2")
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01)
    others = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("block")}
    model.clamp()
    for block in model.blocks:
        assert all((p >= 0).all() for p in block.parameters())
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def test_a_slice_is_a_plain_sequence_of_the_same_layers():
    model = small().eval()
    images = torch.rand(2, 1, 28, 28)
    head, tail = model[:4], model[4:]
    assert type(head) is nn.Sequential and [n for n, _ in tail.named_children()] == [
        "bn2",
        "classifier",
    ]
    assert head[3] is model[3] is model.blocks[0] and model[-1] is model.classifier
    torch.testing.assert_close(tail(head(images)), model(images))


def test_a_loop_written_for_the_authors_networks():
    """The README's promise: blocks' counts and clamp, in a loop that knows nothing else."""
    model = small("multi_conv_pcdeq_1")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x, y = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        model.clamp()
        assert all(b.deq.iter_forward > 0 and b.deq.iter_backward > 0 for b in model.blocks)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Options: equal results, and dtypes


def trained(name: str) -> Network:
    """A few steps away from the initial weights, whose blocks do almost nothing."""
    model = small(name)
    with torch.no_grad():
        for block in model.blocks:
            W = block.deq.f.W
            W.weight_v.uniform_(0, 1)
            W.weight_g.uniform_(0.05, 0.25)
    return model


# Relative errors of logits and of all gradients together. Pools route gradients by the largest of
# nine values, which rounding can make another one: hence the wide bounds behind them.
ERRORS = {
    ("linear_pcdeq_1", "bf16"): (0.05, 0.2),
    ("linear_pcdeq_1", "fp32"): (5e-5, 5e-4),
    ("multi_conv_pcdeq_2", "bf16"): (0.4, 1.0),
    ("multi_conv_pcdeq_2", "fp32"): (2e-3, 0.1),
}


@pytest.mark.parametrize("name", ["linear_pcdeq_1", "multi_conv_pcdeq_2"])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_every_option_gives_the_same_logits_and_gradients(name, solver, precision):
    model = trained(name)
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    double = copy.deepcopy(model).double()
    for block in double.blocks:
        block.deq.tol, block.deq.max_iter = 1e-12, 1000
    for block in model.blocks:
        block.deq.solver, block.deq.precision, block.deq.tol = solver, precision, 1e-6
    logits, exact = model(x), double(x.double())
    F.cross_entropy(logits, y).backward()
    F.cross_entropy(exact, y).backward()
    forward, backward = ERRORS[name, "bf16" if precision == "bf16" else "fp32"]
    assert (logits - exact).norm() < forward * exact.norm()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, double))
    assert (ours - theirs).norm() < backward * theirs.norm()


@pytest.mark.parametrize("name", ["linear_pcdeq_2", "single_conv_pcdeq_1", "multi_conv_pcdeq_1"])
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_what_stays_in_float32(name, precision):
    model = small(name, precision=precision)
    seen = {}
    for key, child in model.named_children():
        child.register_forward_hook(lambda m, i, out, key=key: seen.update({key: out.dtype}))
    logits = model(torch.rand(2, *DATASETS["mnist"]))
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())
    first = next(dtype for key, dtype in seen.items() if key in ("linear1", "conv1"))
    assert first == (torch.bfloat16 if precision == "bf16" else torch.float32)
    for block in model.blocks:
        solve = block.deq.forward_solve
        assert (solve.full == 0) == (precision == "bf16")
        assert (solve.full < solve.iterations) == (precision != "fp32")


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_a_float64_network_computes_in_float64(precision):
    model = trained("multi_conv_pcdeq_1").double()
    reference = model(torch.ones(2, 1, 28, 28).double())
    for block in model.blocks:
        block.deq.precision = precision
    logits = model(torch.ones(2, 1, 28, 28).double())
    assert logits.dtype == torch.float64 and torch.equal(logits, reference)


def test_channels_last_throughout():
    model = small("multi_conv_pcdeq_1")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
    model(torch.rand(2, 1, 28, 28))
    for before, after in seen:
        assert before.is_contiguous(memory_format=torch.channels_last)
        assert after.is_contiguous(memory_format=torch.channels_last)


def test_deepcopy_and_state_dict():
    model = trained("multi_conv_pcdeq_1").eval()
    images = torch.rand(2, 1, 28, 28)
    other = copy.deepcopy(model)
    assert pcdeq.weights.describe(other) == pcdeq.weights.describe(model)
    assert torch.equal(other(images), model(images))
    fresh = small("multi_conv_pcdeq_1").eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model(images))


def test_flatten_keeps_its_gradient_in_channels_last():
    """And is nn.Flatten otherwise, with no hook where nothing is recorded."""
    h = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    leaf = h.clone().requires_grad_()
    gradients = []
    middle = leaf * 1
    out = Flatten()(middle)
    middle.register_hook(gradients.append)  # after its own
    g = torch.randn_like(out)
    out.backward(g)
    assert torch.equal(out, h.flatten(1)) and torch.equal(leaf.grad.flatten(1), g)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    Flatten()(middle)
    assert len(middle._backward_hooks) == 1  # the test's: its own is on a view
    with torch.no_grad():
        still = leaf * 1
        Flatten()(still)
    assert still._backward_hooks is None
    vectors = torch.randn(4, 6, requires_grad=True)
    Flatten()(vectors).sum().backward()
    assert torch.equal(vectors.grad, torch.ones(4, 6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of what dynamo thinks of a cache
def test_a_compiled_network_is_the_same():
    torch.manual_seed(0)
    network = build_network("single_conv_pcdeq_1", "tanh")
    batches = torch.rand(3, 2, 1, 28, 28)
    results, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for model in (network, torch.compile(network, backend=backend)):
        network.zero_grad()
        for images in batches:
            model(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        results.append([p.grad.clone() for p in network.parameters()])
    assert 0 < len(graphs) <= 4  # before, beside and behind the block; a solve takes dozens
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
