"""Batch normalisation of few channels: nn.BatchNorm2d, to rounding, and its errors."""

import copy

import pytest
import torch
from torch import nn

from pcdeq import normalisation
from pcdeq.normalisation import BatchNorm2d

ENOUGH = normalisation.ENOUGH


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """Its own arithmetic, whatever the threads and the size, in blocks of unequal length."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name, value in (("ENOUGH", 2), ("BLOCK", 1000)):
        monkeypatch.setattr(normalisation, name, value)


def pair(channels: int, dtype=torch.float64, **options) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(channels, **options), nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        ours.weight.uniform_(-1, 2)
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def images(channels: int, dtype=torch.float64, batch: int = 6, h: int = 5, w: int = 7):
    x = torch.randn(batch, channels, h, w, dtype=dtype) * 3 + 1
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(6, 5, 7), (1, 2, 1), (64, 4, 4), (2, 1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 12, 20, 50])
def test_values_gradients_and_statistics_are_those_of_torch(channels, shape):
    ours, theirs = pair(channels)
    batch, h, w = shape
    for _ in range(3):  # the running statistics move each time
        x = images(channels, batch=batch, h=h, w=w)
        g = torch.randn_like(x)
        results = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            gradients = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), g)
            results.append((y, *gradients))
        for mine, reference in zip(*results, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[0][:2])
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.fixture
def own(monkeypatch) -> list[int]:
    """The channels of the batches that its own arithmetic gets."""
    calls, apply = [], normalisation._Normalise.apply
    monkeypatch.setattr(
        normalisation._Normalise, "apply", lambda *a: calls.append(a[0].shape[1]) or apply(*a)
    )
    return calls


def test_its_own_arithmetic_is_for_channels_that_fill_no_cache_line(own):
    for channels in (1, 8, 12, 16, 20, 24, 32, 48, 50, 82, 125, 128, 140):
        BatchNorm2d(channels)(images(channels, torch.float32))
    assert own == [1, 8, 12, 20, 24, 50, 82, 125]
    own.clear()
    for channels in (8, 12, 16):
        BatchNorm2d(channels).double()(images(channels, torch.float64))
    assert own == [12]


def test_its_own_arithmetic_is_for_many_values_and_several_threads(own, monkeypatch):
    monkeypatch.setattr(normalisation, "ENOUGH", ENOUGH)
    for size in (6, 13, 28):
        BatchNorm2d(12)(images(12, torch.float32, batch=64, h=size, w=size))
    assert len(own) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    BatchNorm2d(12)(images(12, torch.float32, batch=64, h=28, w=28))
    assert len(own) == 2


def test_first_and_second_derivatives():
    ours, _ = pair(3)
    x = images(3, batch=2, h=2, w=3).requires_grad_()
    arguments = (x, *ours.parameters())
    y = lambda h, w, b: normalisation._Normalise.apply(h, w, b, ours.eps)[0]  # noqa: E731
    assert torch.autograd.gradcheck(y, arguments)
    assert torch.autograd.gradgradcheck(y, arguments)


def test_a_layer_that_writes_in_place_may_follow():
    ours, theirs = pair(12, torch.float32)
    x = images(12, torch.float32)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = nn.Sequential(layer, nn.ReLU(inplace=True))(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_float32_is_as_close_to_the_truth_as_torch():
    ours, theirs = pair(12, torch.float32)
    x = images(12, torch.float32, batch=64, h=28, w=28) + 100  # a mean far from 0
    truth = copy.deepcopy(theirs).double()(x.double())
    error = (ours(x) - truth).abs().max()
    assert error <= 2 * (theirs(x) - truth).abs().max()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(),  # another layout
        lambda x: x[:, :, ::2],  # a view with gaps
        lambda x: x[:, :, :, :1],
    ],
)
def test_what_it_does_not_speed_up_is_left_to_torch(change):
    ours, theirs = pair(12, torch.float32)
    x = change(images(12, torch.float32))
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [12, 20, 50, 125])
def test_a_lower_precision_leaves_in_that_of_the_parameters(channels, low, training):
    ours, theirs = (layer.train(training) for layer in pair(channels, torch.float32))
    x = images(channels, torch.float32, batch=16).to(low)
    g = torch.randn(x.shape)
    results = []
    for layer, dtype in ((ours, low), (theirs, torch.float32)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", low):
            y = layer(leaf)
        grads = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), g)
        assert y.dtype == torch.float32 and grads[0].dtype == dtype
        results.append((y, grads[0].float(), *grads[1:], layer.running_mean, layer.running_var))
    for i, (mine, reference) in enumerate(zip(*results, strict=True)):
        assert mine.dtype == reference.dtype
        rounding = 2.0**-7 if i == 1 else 1e-4
        torch.testing.assert_close(mine, reference, rtol=rounding, atol=rounding)
    assert torch.equal(ours.running_mean, torch.zeros(channels)) == (not training)
    assert ours._is_faster(x.float()) == training
    if not ours._is_faster(x.float()):  # it is left to torch
        assert torch.equal(ours(x), theirs(x.float()))
        assert torch.equal(ours.running_var, theirs.running_var)


def test_a_model_in_bfloat16_stays_in_it():
    ours, theirs = pair(12, torch.bfloat16)
    x = images(12, torch.float32).bfloat16()
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == torch.bfloat16


def test_evaluation_is_torch_s_own():
    ours, theirs = pair(12, torch.float32)
    x = images(12, torch.float32)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_one_value_a_channel_is_torch_s_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm2d(3)(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("x", [torch.randn(4, 20, 3, 3), torch.randn(4, 12, 3, 3).double()])
def test_errors_are_torch_s(x):
    x = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError) as reference:
        nn.BatchNorm2d(12)(x)
    with pytest.raises(RuntimeError) as error:
        BatchNorm2d(12)(x)
    assert str(error.value) == str(reference.value)


def test_options_of_torch_s_layer_work():
    for options in ({"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        ours, theirs = BatchNorm2d(12, **options), nn.BatchNorm2d(12, **options)
        x = images(12, torch.float32)
        torch.testing.assert_close(ours(x), theirs(x))
        assert all(
            torch.allclose(a, b, rtol=1e-5)
            for a, b in zip(ours.buffers(), theirs.buffers(), strict=True)
        )


def test_it_becomes_a_synchronised_one():
    """DistributedDataParallel on GPUs converts every batch norm; ours must be one of them."""
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNorm2d(12)))[0]
    assert type(layer) is nn.SyncBatchNorm
