"""The list of all checks, which of them apply to a potential, and the ways to run them."""

from __future__ import annotations

import functools
import unittest
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tumbaga.online.conformance import answers, files, learning, physics, tuning
from tumbaga.online.conformance.subject import ConformanceError, Loader, Subject, Tolerances
from tumbaga.online.ports import Potential, Trainable, Tunable
from tumbaga.online.records import Frame

Needs = Callable[[Subject], str]  # says why a check does not apply; empty if it does


def _reach(subject: Subject) -> str:
    return "" if 0 < subject.potential.spec.cutoff < np.inf else "its cutoff is zero or infinite"


def _range(subject: Subject) -> str:
    return "" if subject.potential.spec.cutoff < np.inf else "its cutoff is infinite"


def _elements(subject: Subject) -> str:
    return "" if answers.unknown_elements(subject.potential.spec) else "it knows all elements"


def _loader(subject: Subject) -> str:
    return "" if subject.load else "no loader is given"


def _learns(subject: Subject) -> str:
    return "" if subject.potential.spec.n_hidden else "it has no readout to learn"


def _tunes(subject: Subject) -> str:
    return "" if isinstance(subject.potential, Tunable) else "its readout is all that can be trained"


@dataclass(frozen=True)
class Check:
    """One promise of the port.

    Attributes:
        run: the check itself; its docstring is the promise.
        needs: what must be there for it to apply.
    """

    run: Callable[[Subject], None]
    needs: tuple[Needs, ...] = ()

    def __str__(self) -> str:
        return self.run.__name__

    @property
    def promise(self) -> str:
        """The promise, in a sentence."""
        return str(self.run.__doc__).strip()

    def why_not(self, subject: Subject) -> str:
        """Why it does not apply to a subject; empty if it does."""
        return next((why for why in (need(subject) for need in self.needs) if why), "")

    def __call__(self, subject: Subject) -> None:
        """Hold a subject against the promise.

        Raises:
            ConformanceError: it breaks it, or raises something that it should not.
            unittest.SkipTest: the promise does not apply; pytest counts that as skipped.
        """
        if why := self.why_not(subject):
            raise unittest.SkipTest(why)
        try:
            self.run(subject)
        except ConformanceError:
            raise
        except Exception as error:
            raise ConformanceError(str(self).replace("_", " "), f"it raised {type(error).__name__}: {error}") from error


CHECKS: Final = (
    Check(answers.it_declares_itself),
    Check(answers.it_gives_a_sound_prediction_of_each_frame),
    Check(answers.a_batch_says_what_its_frames_say_alone),
    Check(answers.earlier_calls_change_nothing),
    Check(answers.an_unknown_element_is_refused, (_elements,)),
    Check(answers.strange_geometries_do_not_raise),
    Check(answers.float32_follows_float64, (_loader,)),
    Check(physics.forces_are_the_slope_of_the_energy),
    Check(physics.the_virial_is_the_slope_along_strain),
    Check(physics.a_translation_changes_nothing),
    Check(physics.a_rotation_turns_forces_and_virial),
    Check(physics.the_order_of_the_atoms_does_not_matter),
    Check(physics.the_net_force_is_zero),
    Check(physics.an_atom_alone_feels_nothing),
    Check(physics.a_wide_box_changes_nothing, (_range,)),
    Check(physics.wrapping_changes_nothing, (_range,)),
    Check(physics.a_supercell_is_its_cells, (_range,)),
    Check(physics.energies_of_what_is_far_apart_add_up, (_range,)),
    Check(physics.nothing_jumps_at_the_cutoff, (_reach,)),
    Check(learning.the_readout_is_what_serves, (_learns,)),
    Check(learning.features_are_those_of_the_energy, (_learns,)),
    Check(learning.features_and_readout_give_the_energy, (_learns,)),
    Check(learning.force_rows_give_the_forces, (_learns,)),
    Check(learning.each_frame_is_served_by_its_own_readout, (_learns,)),
    Check(files.the_state_is_plain_numbers, (_learns,)),
    Check(files.the_state_is_a_copy, (_learns,)),
    Check(files.a_version_is_a_potential_by_itself, (_learns, _loader)),
    Check(files.a_version_unpickles_nothing, (_learns, _loader)),
    Check(tuning.every_parameter_is_in_one_group, (_learns, _tunes)),
    Check(tuning.training_sees_what_serves, (_learns, _tunes)),
    Check(tuning.a_loss_has_its_gradient, (_learns, _tunes)),
    Check(tuning.training_touches_nothing_that_serves, (_learns, _tunes)),
)


def check(subject: Subject) -> None:
    """Run all checks that apply.

    Raises:
        ConformanceError: the first promise that is broken.
    """
    for one in CHECKS:
        if not one.why_not(subject):
            one(subject)


def check_potential(
    potential: Potential,
    frames: Sequence[Frame] | None = None,
    tolerances: Tolerances | None = None,
    load: Loader | None = None,
    rest: str = "",
) -> None:
    """Hold a potential against its port: all checks that apply, those of a readout too if it declares one.

    Args:
        potential: itself.
        frames: sound frames of its elements, best of different sizes; None makes some.
        tolerances: None takes those of the dtype that it declares.
        load: its loader; None leaves out the checks that load it again.
        rest: what the loader gets.

    Raises:
        ConformanceError: the first promise that is broken.
    """
    one = Subject.of(potential, frames, tolerances)
    check(Subject(one.potential, one.frames, one.tolerances, load, rest))


def check_trainable(
    trainable: Trainable,
    frames: Sequence[Frame] | None = None,
    tolerances: Tolerances | None = None,
    load: Loader | None = None,
    rest: str = "",
) -> None:
    """The same for a potential that must have a readout; see `check_potential`.

    Raises:
        ConformanceError: the first promise that is broken, or that it has no readout.
    """
    if not trainable.spec.n_hidden:
        raise ConformanceError("a trainable potential has a readout", "spec.n_hidden is 0")
    check_potential(trainable, frames, tolerances, load, rest)


def as_test(make: Callable[[], Subject]) -> Callable[[Check], None]:
    """Return a test function for pytest, one case for each check.

    Args:
        make: makes the subject; called once, and not before the first case runs.
    """
    import pytest  # only where tests are run

    once = functools.cache(make)

    def keeps_its_promises(check: Check) -> None:
        """It keeps a promise of the port."""
        check(once())

    marked: Callable[[Check], None] = pytest.mark.parametrize("check", CHECKS, ids=str)(keeps_its_promises)
    return marked
