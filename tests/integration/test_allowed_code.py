"""A model that names code of its own: refused with the hash to give; once given, the shipped class is loaded."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import CASES, MODELS, Nightjar

ROWS = CASES / "A1-left-pad" / "input.parquet"
CODE = "raise SystemExit('code of the model folder was run')\n"


@pytest.fixture
def nightjar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Nightjar:
    monkeypatch.setenv("NIGHTJAR_CACHE", str(tmp_path / "ours"))
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """tiny-a, naming code in its config and in its tokenizer's."""
    folder = Path(shutil.copytree(MODELS / "tiny-a", tmp_path / "model"))
    (folder / "evil.py").write_text(CODE)
    name_code(folder / "config.json", AutoConfig="evil.C", AutoModelForCausalLM="evil.M")
    name_code(folder / "tokenizer_config.json", AutoTokenizer=["evil.T", None])
    return folder


def name_code(path: Path, **auto_map: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


def digests(model: Path) -> list[str]:
    names = ("config.json", "tokenizer_config.json")
    return [hashlib.sha256((model / name).read_bytes()).hexdigest() for name in names]


@pytest.mark.parametrize("stage_to", ["auto", "cache"])
def test_code_that_is_allowed_by_its_hash_is_set_aside_and_the_run_is_the_same(
    nightjar: Nightjar, model: Path, tmp_path: Path, stage_to: str
) -> None:
    where = stage_to if stage_to == "auto" else str(tmp_path / stage_to)
    settings = {"model__source": str(model), "hardware__stage_to": where}
    config, tokenizer = digests(model)
    refused = nightjar.run("none", ROWS, **settings)
    assert refused.code == 2
    assert f"model.allowed_code: [{config}]" in refused.err
    refused = nightjar.run("none", ROWS, **settings, model__allowed_code=[config])
    assert refused.code == 2
    assert f"--allow-code {tokenizer}" in refused.err
    allowed = nightjar.run("none", ROWS, **settings, model__allowed_code=[config, tokenizer])
    assert allowed.code == 0, allowed.err
    assert allowed.rows == nightjar.run("tiny-a", ROWS).rows


def test_a_staged_copy_does_not_carry_the_allowance_with_it(
    nightjar: Nightjar, model: Path, tmp_path: Path
) -> None:
    there = ["--to", str(tmp_path / "there")]
    flags = [flag for digest in digests(model) for flag in ("--allow-code", digest)]
    assert nightjar.call("stage", str(model), *there).code == 2
    staged = nightjar.call("stage", str(model), *there, *flags, "--json")
    assert staged.code == 0, staged.err
    assert staged.document["skipped"] == ["evil.py"]
    settings = {"model__source": str(model), "hardware__stage_to": there[1]}
    assert "never run" in nightjar.run("none", ROWS, **settings).err


def test_a_model_that_only_its_own_code_could_load_is_refused_by_name(
    nightjar: Nightjar, model: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    refused = nightjar.run(
        "none", ROWS, model__source=str(model), model__allowed_code=digests(model)
    )
    assert refused.code == 2
    assert "model_type 'evil', for which transformers" in refused.err
