"""One pass over a test set: its figures against a loop written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from pcdeq import build_network
from pcdeq.experiments import data
from pcdeq.experiments.evaluation import evaluate
from pcdeq.experiments.parallel import Processes

BATCH = 60


@pytest.fixture(scope="module")
def digits():
    test = data.load("mnist", sample=True)[1]
    return data.ImageSet(test.images[::7], test.labels[::7], test.mean, test.std)  # 143


def trained(**options):
    """A network whose running statistics and solves are no longer those of the start."""
    torch.manual_seed(0)
    network = build_network("linear_pcdeq_1", "relu6", **options)
    train = data.load("mnist", sample=True)[0]
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for first in range(0, 640, 64):
        x, y = train.batch(slice(first, first + 64))
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        network.clamp()
    return network


def test_the_figures_are_those_of_a_loop_by_hand(digits):
    network = trained()
    result = evaluate(network, digits, BATCH)
    network.eval()
    logits, iterations = [], []
    for first in range(0, len(digits), BATCH):  # 60, 60 and 23 images
        logits.append(network(digits.batch(slice(first, first + BATCH))[0]))
        iterations.append(network.block.deq.iter_forward)
    logits = torch.cat(logits)
    assert len(logits) == len(digits) == 143
    assert result.accuracy == 100 * (logits.argmax(1) == digits.labels).sum().item() / 143
    assert result.loss == pytest.approx(F.cross_entropy(logits, digits.labels).item(), rel=1e-6)
    assert result.forward_iters == pytest.approx(sum(iterations) / 3)
    assert result.forward_iters_max == max(iterations)
    assert result.unconverged == 0
    assert result.images_per_second == pytest.approx(143 / result.seconds)


def test_unconverged_solves_are_counted(digits):
    network = trained(max_iter=2)
    result = evaluate(network, digits, BATCH)
    assert (result.unconverged, result.forward_iters, result.forward_iters_max) == (3, 2.0, 2)


@pytest.mark.parametrize("mode", [True, False])
def test_the_network_is_as_it_was_also_after_a_stop(digits, mode):
    network = trained().train(mode)
    network.bn1.eval()  # as someone may have it
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, digits, BATCH)
    assert network.training is mode and not network.bn1.training

    def stop():
        assert not network.training and torch.is_inference_mode_enabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(network, digits, BATCH, after_batch=stop)
    assert network.training is mode
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    x, y = digits.batch(slice(0, 60))
    F.cross_entropy(network(x), y).backward()  # nothing of the inference mode is left behind


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_several_processes_see_each_image_once(digits, world):
    """Each rank's own sums, caught before they meet, add up to the whole."""
    network = trained()
    whole = evaluate(network, digits, BATCH)

    class Rank(Processes):
        def _reduce(self, values, operation):
            caught.append(values)
            return [value + 1e-9 for value in values]  # no division by a rank's zero solves

    caught = []
    for rank in range(world):  # of five, two have no batch at all
        evaluate(network, digits, BATCH, processes=Rank(torch.device("cpu"), rank, world, rank))
    sums = [sum(column) for column in zip(*caught[::2], strict=True)]
    loss, right, iterations, solves, unconverged = sums
    assert 100 * right / len(digits) == whole.accuracy
    assert loss / len(digits) == pytest.approx(whole.loss, rel=1e-12)
    assert iterations / solves == whole.forward_iters
    assert max(value for (value,) in caught[1::2]) == whole.forward_iters_max
    assert unconverged == 0
