"""Workdirs and configs by name, path and text."""

import json

import pytest

from diffjax.runs.workdir import (
    RunError,
    claim,
    differences,
    load_config,
    plain,
    read_config,
    versioned,
)


def test_a_workdir_keeps_its_config(tmp_path):
    config = load_config("digits:quick")
    claim(tmp_path, config)
    assert plain(read_config(tmp_path)) == plain(config)
    claim(tmp_path, config)  # the same again is no error


def test_another_config_is_refused_by_field(tmp_path):
    claim(tmp_path, load_config("digits:quick"))
    other = load_config("digits:quick").unlock()
    other.optim.lr = 0.5
    with pytest.raises(RunError, match=r"optim\.lr: .* -> 0\.5.*another --workdir"):
        claim(tmp_path, other)
    assert read_config(tmp_path).optim.lr != 0.5


def test_damage_and_other_schemas_are_named(tmp_path):
    with pytest.raises(RunError, match="no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"schema": 99, "config": {}}))
    with pytest.raises(RunError, match="schema 99"):
        read_config(tmp_path)


def test_a_config_of_schema_1_gets_the_defaults_of_later_fields(tmp_path):
    today = plain(load_config("digits:quick"))
    early = json.loads(json.dumps(today))
    later = ["training.keep", "training.init_from", "optim.moment_dtype", "data.workers"]
    later += ["data.ahead", "data.placed", "model.dtype", "model.remat"]
    for section, field in (name.split(".") for name in later):
        del early[section][field]
    del early["mesh"]
    early["ema"] = {"name": "half_life", "half_life_images": 500.0}
    (tmp_path / "config.json").write_text(json.dumps({"schema": 1, "config": early}))
    read = plain(read_config(tmp_path))
    assert read == today | {"ema": early["ema"] | {"offload": False}}
    # The same command as then goes on in this directory, whether it says the default or not.
    config = load_config("digits:quick").unlock()
    config.ema = early["ema"]
    claim(tmp_path, config)
    config.ema.offload = False
    claim(tmp_path, config)
    config.training.keep.best = 1
    with pytest.raises(RunError, match=r"training\.keep\.best: 0 -> 1"):
        claim(tmp_path, config)


def test_stored_configs_say_their_schema(tmp_path):
    config = load_config("digits:quick")
    claim(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == versioned(config) == {"schema": 2, "config": plain(config)}


def test_differences_go_down_into_sections():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}) == [
        "a.b: 1 -> 3",
        "d: absent -> 4",
    ]


def test_a_config_of_ones_own_may_import_the_shipped_pieces(tmp_path):
    folder = tmp_path / "elsewhere" / "configs"
    folder.mkdir(parents=True)
    (folder / "piece.py").write_text("LR = 0.125\n")
    (folder / "mine.py").write_text(
        "from configs import common, piece\n\n\n"
        "def get_config(batch='8'):\n"
        "    config = common.base()\n"
        "    config.optim.lr = piece.LR\n"
        "    config.training.batch_size = int(batch)\n"
        "    return config\n"
    )
    config = load_config(f"{folder / 'mine.py'}:32")
    assert (config.optim.lr, config.training.batch_size) == (0.125, 32)


def test_unknown_names_name_the_nearest(tmp_path):
    with pytest.raises(RunError, match="neither a file nor shipped. Did you mean digits"):
        load_config("digit")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(RunError, match="must define get_config"):
        load_config(str(tmp_path / "empty.py"))
