"""Which runs are the same run, and who is still alive."""

import os
import subprocess
import sys

import pytest

from flows.config import load_job
from storage.errors import BadInput, FingerprintMismatch
from tasks.fingerprint import check_fingerprint, default_run_id, fingerprint, fingerprint_fields
from tasks.holder import holder_name, is_dead
from tasks.scratch import scratch_folder

BASE = {"model": {"source": "m"}, "input": {"uri": "in"}, "output": {"uri": "out"}}


def fields_of(*overrides: str, content_id: str = "c1") -> dict:
    job = load_job(BASE, overrides=overrides)
    return fingerprint_fields(job, model_content_id=content_id, backend="dummy", max_model_len=99)


@pytest.mark.parametrize(
    "override",
    [
        "sampling.max_tokens=5",
        "sampling.stop=[on]",
        "sampling.seed=1",
        "input.prompt='{a}'",
        "input.chat_template=none",
        "input.chat_template_kwargs={enable_thinking: false}",
        "input.on_overlong=truncate_left",
        "model.quantization=int8",
        "model.dtype=float32",
        "engine.kv_cache_dtype=fp8",
    ],
)
def test_whatever_changes_a_token_changes_the_fingerprint(override):
    assert fingerprint(fields_of(override)) != fingerprint(fields_of())


def test_a_chat_template_that_is_not_there_is_refused_by_name():
    with pytest.raises(
        BadInput, match=r"cannot read no\.jinja: .*; give auto, none or a Jinja file"
    ):
        fields_of("input.chat_template=no.jinja")


@pytest.mark.parametrize(
    "override",
    [
        "shards.max_rows=3",
        "engine.max_num_seqs=4",
        "engine.offload=cpu",
        "max_failed_rows=1",
        "budget.usd=1",
    ],
)
def test_what_changes_no_token_keeps_the_fingerprint(override):
    assert fingerprint(fields_of(override)) == fingerprint(fields_of())


def test_other_weights_are_another_run():
    assert fingerprint(fields_of(content_id="c2")) != fingerprint(fields_of())


def test_an_edited_template_file_is_another_run(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    before = fields_of(f"input.chat_template={template}")
    template.write_text("{{ messages }}!")
    assert fingerprint(fields_of(f"input.chat_template={template}")) != fingerprint(before)


def test_a_mismatch_names_the_fields_with_both_values():
    with pytest.raises(FingerprintMismatch) as caught:
        check_fingerprint("s3://b/r", fields_of(), fields_of("sampling.max_tokens=5"))
    assert "sampling.max_tokens was 512, now 5" in str(caught.value)


def test_tonights_files_make_a_new_run_and_the_same_files_resume():
    first = default_run_id("nightly", "f", ["etag-1"])
    assert first == default_run_id("nightly", "f", ["etag-1"])
    assert first != default_run_id("nightly", "f", ["etag-2"])
    assert first.startswith("nightly-")


def test_this_process_is_alive_and_an_ended_one_is_dead():
    code = "from tasks.holder import holder_name; print(holder_name())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not is_dead(holder_name())
    assert is_dead(ended.stdout.strip())


def test_a_holder_of_another_machine_is_never_called_dead():
    assert not is_dead("elsewhere/" + holder_name().split("/", 1)[1])
    assert not is_dead("no such form")


def test_a_reused_process_id_does_not_revive_the_dead():
    parts = holder_name().split("/")
    parts[3] = str(int(parts[3]) + 1)
    assert is_dead("/".join(parts))


def test_scratch_of_a_dead_process_is_swept_and_of_a_living_one_kept(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from tasks.scratch import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch_folder(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
        with scratch_folder(tmp_path) as other:
            assert {mine, other} == set(tmp_path.iterdir())
        assert os.access(mine, os.W_OK)
    assert not list(tmp_path.iterdir())
