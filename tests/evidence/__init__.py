"""A model that was unlearned, retrained and evaluated, to make evidence of."""

from expunge.cli import main
from tests.cli import SETUP

SECRET = 0.31415926  # in every removed record
SALT = "5a" * 32
EVALUATED = SETUP.replace(
    "loss_terms = cross_entropy",
    f"images[:6, 0] = {SECRET}\nloss_terms = cross_entropy",
).replace(
    "def test():",
    "def forget():\n    return data.only(torch.arange(6))\n\ndef test():",
)


def evaluate(*more, retrained=("r0.safetensors", "r1.safetensors", "r2.safetensors")):
    command = ["evaluate", "setup.py", "--weights", "u.safetensors", "--original", "w.safetensors"]
    return main([*command, *(["--retrained", *retrained] if retrained else []), *more])
