"""The conformance suite of the ports: what every potential behind tumbaga promises, as checks that other packages import.

    from tumbaga.online import conformance
    from my_package import load_backend                        # what the entry point names

    test_my_potential = conformance.as_test(lambda: conformance.Subject.loaded(load_backend, "rest of the name"))

makes a pytest case of each promise; `check_potential` and `check_trainable` run all of them at once, without pytest. A broken one raises
`ConformanceError` with a sentence. Frames are made from the declared elements unless given, tolerances follow from the declared dtype.

It knows the ports, the records and the version files, and no back end.
"""

from tumbaga.online.conformance.frames import sample_frames
from tumbaga.online.conformance.subject import ConformanceError, Loader, Subject, Tolerances
from tumbaga.online.conformance.suite import CHECKS, Check, as_test, check, check_potential, check_trainable

__all__ = [
    "CHECKS",
    "Check",
    "ConformanceError",
    "Loader",
    "Subject",
    "Tolerances",
    "as_test",
    "check",
    "check_potential",
    "check_trainable",
    "sample_frames",
]
