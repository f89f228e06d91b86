"""Values that must never change without a decision: seeds, choices and formats that stored files depend on."""

import torch

from expunge import stream
from expunge.data.digits import digits
from expunge.params import fingerprint, smallest
from expunge.scenarios.labels import wrong_labels
from expunge.scenarios.removal import random_removal
from expunge.seeds import derive


def test_streams_of_randomness():
    assert derive(0, "shuffle", 3) == GOLDEN["derive"]
    assert torch.randint(1000, (4,), generator=stream(7, "shuffle", 0)).tolist() == GOLDEN["stream"]


def test_scenarios():
    assert random_removal(100, 0.05, seed=0).tolist() == GOLDEN["removal"]
    labels, faulty = wrong_labels(torch.arange(20) % 10, 10, 0.15, seed=0)
    assert (faulty.tolist(), labels[faulty].tolist()) == GOLDEN["labels"]


def test_the_digits_of_a_seed():
    split = digits(100, seed=0)
    assert split.train.tensors[1][:10].tolist() == GOLDEN["digits"]
    assert round(float(split.train.tensors[0].double().sum()), 3) == GOLDEN["ink"]


def test_the_fingerprint_of_known_tensors():
    assert fingerprint({"b": torch.arange(3), "a": torch.tensor([[1.5]])}) == GOLDEN["fingerprint"]


def test_the_choice_among_known_scores():
    scores = {"x": (torch.arange(1000.0) * 7919 % 1013).double()}
    assert smallest(scores, 5)["x"].nonzero().flatten().tolist() == GOLDEN["smallest"]


GOLDEN = {
    "derive": 4433227487137452470,
    "stream": [152, 291, 86, 879],
    "removal": [2, 29, 35, 66, 80],
    "labels": ([5, 6, 9], [0, 2, 6]),
    "digits": [4, 3, 2, 0, 8, 1, 0, 8, 4, 3],
    "ink": 1938.688,
    "fingerprint": "e82e718fd31ffe07582a868917155be85107f20d0c0d2ba8e54cfe8a577ed009",
    "smallest": [0, 334, 449, 783, 898],
}
