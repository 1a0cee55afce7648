"""How good a potential is on labelled frames: what `tumbaga evaluate` computes, for programs. Prints nothing, writes nothing.

potential = registry.load("painn:cuau-water", "cpu", "float64")
report = evaluating.evaluate(potential, datasets.read("test.extxyz"))
report.forces.rmse, report.slope.origin
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase.data import chemical_symbols

from tumbaga.driver.choosing import batches
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.evaluator import out_of_memory
from tumbaga.online import accuracy, last_layer, subsets, versions
from tumbaga.online.accuracy import Coverage, EnergyError, ForceError, Judged, Offsets, Slope
from tumbaga.online.calibration import TrackedQuantile, error_ratio
from tumbaga.online.energies import energy_std
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, LabelledFrame, Prediction

BATCH_ATOMS: Final = 512
UNCERTAIN_FRAMES: Final = 200  # force rows cost a pass for each coordinate or feature: a sample is enough for a coverage
Progress = Callable[[str, int], None]  # what is done, and how many frames more of it


@dataclass(frozen=True, eq=False)
class LastLayer:
    """What is known of how unsure a potential's readout is.

    Attributes:
        covariance: of the readout, shape (n_columns, n_columns), float64, eV².
        multiplier: how many standard deviations cover the largest force error of a frame in `promised` of the frames.
        promised: share of frames.
        told: where both come from.
        energy_covariance: of readout and offsets, shape (n_columns + n_species, n_columns + n_species), eV²; None where
            no label has said anything of energies.
    """

    covariance: Array
    multiplier: float
    promised: float
    told: str
    energy_covariance: Array | None = None


@dataclass(frozen=True)
class Uncertainty:
    """How predicted uncertainties compare with the errors.

    Attributes:
        frames: how many were looked at.
        components: share of force components within the normal interval of their std.
        factor: what the stds would have to be multiplied with to fit the errors: above 1 they are too small.
        multiplier: of the version; its flagging score is this times the largest std of a frame.
        frame_coverage: share of frames whose largest error over std is within the multiplier.
        told: where covariance and multiplier come from.
        energies: share of total energies, up to a constant for each element, within the normal interval of their std; empty where that is
            not known.
        energy_factor: what the stds of energies would have to be multiplied with; nan likewise.
    """

    frames: int
    components: list[Coverage]
    factor: float
    multiplier: float
    frame_coverage: Coverage
    told: str
    energies: list[Coverage] = field(default_factory=list)
    energy_factor: float = math.nan


@dataclass(frozen=True)
class Report:
    """What was found. Forces eV/Å, energies eV per atom.

    Attributes:
        frames: frames judged.
        not_finite: frames that the potential gave no finite numbers for; they are not in the figures.
        forces: error over all atoms.
        by_element: by chemical symbol.
        by_magnitude: (low, high, error) by the labelled force on the atom.
        energies_raw: error of the energies as they are.
        energies: error after the offsets; None where there are not more frames than offsets.
        offsets: what was added.
        slope: softening.
        uncertainty: None where the potential has no readout, or it was not asked for.
    """

    frames: int
    not_finite: int
    forces: ForceError
    by_element: dict[str, ForceError]
    by_magnitude: list[tuple[float, float, ForceError]]
    energies_raw: EnergyError
    energies: EnergyError | None
    offsets: Offsets
    slope: Slope
    uncertainty: Uncertainty | None

    def plain(self) -> dict[str, Any]:
        """The report as JSON knows it: units in the names of nothing, eV and Å throughout; numbers that are not finite are None."""
        found = asdict(self)
        found["by_magnitude"] = [{"from": low, "to": high, **asdict(error)} for low, high, error in self.by_magnitude]
        symbols = [chemical_symbols[z] for z in self.offsets.elements]
        found["offsets"] = {
            "method": "least squares of label minus prediction per atom on the share of each element",
            "eV_per_atom": dict(zip(symbols, self.offsets.energies, strict=True)),
            "rank": self.offsets.rank,
        }
        plain: dict[str, Any] = finite(found)
        return plain


def evaluate(
    potential: Potential,
    data: Sequence[LabelledFrame],
    layer: LastLayer | None = None,
    uncertain_frames: int = UNCERTAIN_FRAMES,
    seed: int = 0,
    batch_atoms: int = BATCH_ATOMS,
    progress: Progress | None = None,
) -> tuple[Report, list[Judged]]:
    """Judge a potential by labelled frames; returns the report, and the judged frames it is about.

    Args:
        potential: any.
        data: labelled frames.
        layer: what is known of its readout, see `last_layer_of`; None leaves out uncertainties.
        uncertain_frames: frames, taken by chance, whose uncertainties are computed, at most.
        seed: of that choice and of the bootstrap.
        batch_atoms: atoms that are evaluated at once, at most (a frame of more by itself).
        progress: told what is going on.

    Raises:
        PotentialError: it does not know an element, or gives finite numbers for none of the frames.
    """
    judged, lost = judge(potential, data, batch_atoms, progress)
    if layer is not None and isinstance(potential, Trainable):
        judged = with_stds(potential, judged, layer, uncertain_frames, seed, progress)
    added = accuracy.offsets(judged)
    report = Report(
        frames=len(judged),
        not_finite=lost,
        forces=accuracy.force_error(judged),
        by_element={chemical_symbols[z]: error for z, error in accuracy.by_element(judged).items()},
        by_magnitude=accuracy.by_magnitude(judged),
        energies_raw=accuracy.energy_error(judged),
        energies=accuracy.energy_error(judged, added) if len(judged) > added.rank else None,
        offsets=added,
        slope=accuracy.slope(judged, seed),
        uncertainty=None if layer is None else _uncertainty(judged, layer, added),
    )
    return report, judged


def judge(
    potential: Potential, data: Sequence[LabelledFrame], batch_atoms: int = BATCH_ATOMS, progress: Progress | None = None
) -> tuple[list[Judged], int]:
    """Evaluate all frames; returns them with the predictions, and the number of those whose prediction was not finite.

    Raises:
        PotentialError: it does not know an element, gives finite numbers for none of the frames, or memory does not suffice.
    """
    _check_elements(potential, data)
    judged: list[Judged] = []
    for part in batches(data, batch_atoms):
        said = _predicted(potential, part)
        pairs = zip(part, said, strict=True)
        judged += [
            Judged(one.frame, one.label, p.energy, p.forces) for one, p in pairs if np.isfinite(p.energy) and np.isfinite(p.forces).all()
        ]
        if progress is not None:
            progress("predicting", len(part))
    if not judged:
        raise PotentialError(potential.spec.name, f"gives finite energies and forces for none of the {len(data)} frames")
    return judged, len(data) - len(judged)


def with_stds(
    potential: Trainable, judged: Sequence[Judged], layer: LastLayer, frames: int, seed: int = 0, progress: Progress | None = None
) -> list[Judged]:
    """Return the judged frames, so many of them by chance with the standard deviation of each force component, and of the energy."""
    found = list(judged)
    for k in subsets.by_chance(len(judged), frames, seed):
        model = potential.force_rows(judged[k].frame)
        variances = np.einsum("ij,ij->i", model.rows @ layer.covariance, model.rows)
        composition = np.array([(judged[k].frame.numbers == z).sum() for z in potential.spec.elements], dtype=np.float64)
        std = energy_std(model.phi, composition, layer.energy_covariance)
        found[k] = replace(judged[k], stds=np.sqrt(np.maximum(variances, 0.0)).reshape(-1, 3), energy_std=std)
        if progress is not None:
            progress("uncertainties", 1)
    return found


def last_layer_of(potential: Potential, file: Path | None) -> LastLayer | None:
    """Return what is known of a potential's readout: from its version file, if it was loaded from one, else the prior alone.

    The multiplier is that of the run which serves the version, where its directory says so, else that with which the version began to serve.

    Args:
        potential: any; None is returned for one without a readout.
        file: the weights file it was loaded from, if there is one.
    """
    if not (isinstance(potential, Trainable) and potential.spec.n_hidden):
        return None
    start = TrackedQuantile()
    promised = 1.0 - start.miscoverage
    layer = _version(file, potential) if file is not None else None
    if layer is None:
        prior = last_layer.fit([], potential.readout(), mean_h2=potential.spec.mean_h2 or 1.0).covariance
        scale = (
            ""
            if potential.spec.mean_h2
            else "; the scale of its features is not known, so that only ratios of uncertainties mean something"
        )
        return LastLayer(prior, start.q, promised, f"the prior of the last layer, as a run starts{scale}")
    multiplier, told = (_multiplier(file) if file is not None else None), "the version's posterior and the multiplier of its run"
    if multiplier is None:
        known = layer.facts.get(versions.QUANTILE)
        multiplier, whose = (float(known), "it began") if isinstance(known, float) else (start.q, "a run starts")
        told = f"the version's posterior; the multiplier is that with which {whose}"
    return LastLayer(layer.covariance, multiplier, promised, told, layer.energy_covariance)


def _version(file: Path, potential: Trainable) -> versions.LastLayer | None:
    try:
        layer = versions.read(file)
    except VersionError:
        return None  # weights that no run has learnt
    same = layer.readout.shape == (potential.spec.n_columns,) and np.allclose(layer.readout, potential.readout())
    return layer if same else None


def _multiplier(file: Path) -> float | None:
    """The calibration of the run that serves this very file, or None."""
    try:
        told = json.loads((file.parent / versions.SERVING).read_text())
        served = Path(str(told["path"])).name == file.name
        return float(told["quantile"]) if served else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _uncertainty(judged: Sequence[Judged], layer: LastLayer, added: Offsets) -> Uncertainty:
    known = [one for one in judged if one.stds is not None]
    ratios = [error_ratio(one.label.forces, one.forces, np.linalg.norm(one.stds, axis=1)) for one in known if one.stds is not None]
    within = float(np.mean([ratio <= layer.multiplier for ratio in ratios])) if ratios else math.nan
    return Uncertainty(
        len(known),
        accuracy.coverage(known),
        accuracy.width_factor(known),
        layer.multiplier,
        Coverage(layer.promised, within),
        layer.told,
        accuracy.energy_coverage(known, added),
        accuracy.energy_width_factor(known, added),
    )


def _predicted(potential: Potential, part: Sequence[LabelledFrame]) -> list[Prediction]:
    try:
        return potential.predict([one.frame for one in part])
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        atoms = sum(len(one.frame) for one in part)
        told = f"ran out of memory with {len(part)} frames of {atoms} atoms at once; evaluate fewer with --batch-atoms"
        raise PotentialError(potential.spec.name, told) from error


def _check_elements(potential: Potential, data: Sequence[LabelledFrame]) -> None:
    known = set(potential.spec.elements)
    for one in data:
        strange = sorted(set(one.frame.numbers.tolist()) - known) if known else []
        if strange:
            name, ours = chemical_symbols[strange[0]], ",".join(chemical_symbols[z] for z in potential.spec.elements)
            told = f"does not know {name}, which {one.source or 'a frame'} holds; leave such frames out with --only {ours:.200}"
            raise PotentialError(potential.spec.name, told)


def finite(value: Any) -> Any:
    """Return the same with None for numbers that are not finite, which JSON does not know; tuples become lists."""
    if isinstance(value, dict):
        return {str(key): finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
