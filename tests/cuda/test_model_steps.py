"""The host's part of steps of pretrained models, on a driver that computes nothing: nothing grows, little is read."""

import pytest

from tests.cuda.stub import needs_driver, script

pytestmark = needs_driver

FIT = """
from nblora.training.callbacks import Callback
from tests.cuda import models

model = models.load(MODEL).to("cuda")
x, y = models.data(model)
seen = []


class Count(Callback):
    def on_step_end(self, step, figures):
        seen.append(counts())


nblora.fit(
    model, [*x] * 10 if y is None or not hasattr(model.body, "image") else np.concatenate([x] * 10),
    None if y is None else np.tile(y, 10), optimizer="adamw", epochs=4, batch_size=len(x), seed=0, shuffle=False,
    progress=False, callbacks=[Count()],
)
say(steps=[{name: after[name] - before[name] for name in NAMES} for before, after in zip(seen, seen[1:])])
"""

# Launches of a step that docs/gpu-proofs.md tells, of the tiny models of tests/data/models.
LAUNCHES = {"bert": 98, "llama": 110, "resnet": 127}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_of_a_model(folder, name):
    """Four epochs of ten steps of one batch."""
    steps = script(folder, FIT.replace("MODEL", repr(name)))["steps"]
    assert len(steps) == 39
    settled = [step for place, step in enumerate(steps) if place > 2 and (place + 1) % 10]  # an epoch's end does more
    for step in settled:
        assert step == settled[0]
        assert step["launch"] <= LAUNCHES[name]
        assert step["alloc"] == step["free"] == 0
        assert step["d2h"] == 1  # loss, accuracy and norms together


GENERATE = """
from nblora.pretrained.generation import stream_tokens
from tests.cuda import models

model = models.load("llama").to("cuda")
seen = []
for _ in stream_tokens(model, [[1, 2, 3], [4, 5]], max_new_tokens=24, eos=[]):
    seen.append(counts())
say(tokens=[{name: after[name] - before[name] for name in NAMES} for before, after in zip(seen, seen[1:])])
"""


def test_a_token(folder):
    tokens = script(folder, GENERATE)["tokens"]
    for token in tokens[4:]:
        assert token == tokens[4]
        assert token["alloc"] == token["free"] == 0
        assert token["d2h"] == 1
