"""The launch protocol holds under any interleaving of roles, CTAs and ranks: a model of it, run at random."""

from functools import cache

import pytest

from tests.cpu import schedule_library
from tests.cpu.protocol_model import Deadlock, Protocol, Violation, draw

SEEDS = range(150)


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    library = schedule_library.build(tmp_path_factory.mktemp("order"))
    if library is None:
        pytest.skip("not run: no host compiler (g++)")
    return cache(lambda *sizes: schedule_library.tiles(library, *sizes))


def test_tiles_run_once_and_nothing_is_read_early_late_or_from_another_launch(order):
    ahead = 0
    for seed in SEEDS:
        model = draw(seed, order, Protocol())
        try:
            model.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert model.finished == [5] * model.num_ranks
        ahead = max(ahead, model.most_ahead)
    assert ahead == 1  # ranks did run apart; to finish one more launch, a rank needs the others' routing for it


def test_it_holds_when_one_role_after_the_other_starves(order):
    for seed in range(200):
        model = draw(seed, order, Protocol(), num_launches=3, adversarial=True)
        try:
            model.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert model.finished == [3] * model.num_ranks


@pytest.mark.parametrize(
    "protocol, failures",
    [
        (Protocol(num_banks=1), (Violation, Deadlock)),
        (Protocol(flags_hold_epoch=False), (Violation, Deadlock)),
        (Protocol(reverse_tiles=True), (Deadlock,)),
        (Protocol(flag_after_first_tile=True), (Violation,)),
        (Protocol(image_before_row=True), (Violation,)),
    ],
    ids=["one head bank", "flags without the launch's number", "linear2 before linear1", "rows announced too early",
         "rows copied before they are there"],
)
def test_the_model_finds_what_is_wrong(order, protocol, failures):
    found = 0
    for seed in SEEDS:
        try:
            draw(seed, order, protocol).run()
        except failures:
            found += 1
        if found == 3:
            return
    raise AssertionError(f"{found} of {len(SEEDS)} interleavings met it")
