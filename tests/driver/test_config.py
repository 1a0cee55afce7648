"""A configuration is what was written, or one sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tumbaga.driver import config
from tumbaga.driver.config import Config, Flag, Label, Learn, Potential, Serve
from tumbaga.driver.errors import ConfigError

FULL = Config(
    serve=Serve(connect=("unix:cuau", "tcp:[::1]:31415"), prefix="/run/ipi_", max_refusals=7),
    potential=Potential(model="toy:lj?epsilon=0.02", template='a "quoted" name.xyz', device="cpu", dtype="float64"),
    flag=Flag(force_error=0.1 + 0.2, spacing=3, audit_every=17),
    label=Label(
        method="ase:a.b:C", options={"xc": "pbe", "grid": 3, "tol": 1e-9, "fast": True}, workers=2, budget=0, time_limit=0.5, attempts=9
    ),
    learn=Learn(enabled=False, ramp_steps=1, ramp_pause=0),
    seed=12345678901,
)


@pytest.mark.parametrize("made", [Config(), FULL])
def test_what_is_written_is_read(made: Config) -> None:
    """A configuration that went through TOML is equal to the one before, in every digit and type."""
    assert config.parse(config.dumps(made), "here") == made


def test_what_is_not_said_has_its_default() -> None:
    """An empty file is the default configuration, and a section may say only one thing."""
    assert config.parse("", "here") == Config()
    assert config.parse("[flag]\nforce_error = 1", "here") == Config(flag=Flag(force_error=1.0))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[flag]\nforce_eror = 0.1", "force_eror"),
        ("[flags]\nforce_error = 0.1", "flags"),
        ("[label]\nworkers = 'two'", "label.workers"),
        ("[label]\noptions = { deep = { er = 1 } }", "label.options"),
        ("[serve]\nconnect = 'unix:cuau'", "serve.connect"),
        ("[learn]\nenabled = 1", "learn.enabled"),
        ("[flag]\nforce_error = 0", "flag.force_error"),
        ("[flag]\nforce_error = nan", "flag.force_error"),
        ("[flag]\nforce_error = inf", "flag.force_error"),
        ("[flag]\nspacing = 0", "flag.spacing"),
        ("[flag]\naudit_every = 0", "flag.audit_every"),
        ("[label]\nworkers = -1", "label.workers"),
        ("[label]\nbudget = -1", "label.budget"),
        ("[label]\nattempts = 0", "label.attempts"),
        ("[label]\ntime_limit = 0.0", "label.time_limit"),
        ("[label]\nrepeat_every = -1", "label.repeat_every"),
        ("[learn]\nramp_steps = 0", "learn.ramp_steps"),
        ("[learn]\nramp_pause = -1", "learn.ramp_pause"),
        ("[learn]\ncanary_calls = -1", "learn.canary_calls"),
        ("[serve]\nmax_refusals = 0", "serve.max_refusals"),
        ("[potential]\ndtype = 'float16'", "potential.dtype"),
    ],
)
def test_a_wrong_value_is_a_sentence_that_names_its_key(text: str, named: str) -> None:
    """Unknown keys, wrong types and values out of range are one line that holds the name of the key."""
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "run/tumbaga.toml")

    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_toml_is_named() -> None:
    """A syntax error names the file and the line."""
    with pytest.raises(ConfigError, match=r"run/tumbaga\.toml: is not valid TOML.*line 2"):
        config.parse("[flag]\nforce_error = = 1", "run/tumbaga.toml")


def test_a_run_directory_keeps_its_configuration(tmp_path: Path) -> None:
    """What lies in the file of a run directory is loaded; a folder without one is asked whether it is a run directory."""
    with pytest.raises(ConfigError, match="is this a run directory"):
        config.load(tmp_path)
    (tmp_path / config.FILE).write_text(config.dumps(FULL))

    assert config.load(tmp_path) == FULL


@pytest.mark.parametrize("data", [b"\xff\xfe\x00garbage", b"\x00" * 100])
def test_a_file_of_bytes_is_a_sentence(tmp_path: Path, data: bytes) -> None:
    """A configuration file that is not even text is a ConfigError that names it."""
    (tmp_path / config.FILE).write_bytes(data)

    with pytest.raises(ConfigError, match=r"tumbaga\.toml"):
        config.load(tmp_path)
