"""SmolLM2 through the whole pipeline says what plain transformers says, one row at a time."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.pipeline import Nightjar

MODEL = os.environ.get("NIGHTJAR_TEST_MODEL", "")
PROMPTS = Path(__file__).parents[2] / "configs" / "demo_prompts.parquet"
MAX_TOKENS = 6

pytestmark = pytest.mark.skipif(not MODEL, reason="NIGHTJAR_TEST_MODEL names no model folder")


@pytest.fixture(scope="module")
def short_rows(tmp_path_factory):
    """Eighteen short rows of the demo's file, chats of several turns among them."""
    table = pq.read_table(PROMPTS)
    wanted = [
        i for i, name in enumerate(table["id"].to_pylist()) if name.startswith(("ask-", "chat-"))
    ]
    path = tmp_path_factory.mktemp("golden") / "rows.parquet"
    pq.write_table(table.drop_columns(["max_tokens"]).take(wanted[:18]), path)
    return path


@pytest.fixture(scope="module")
def one_at_a_time(short_rows):
    """Greedy text of each row by `model.generate`, batch of one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    texts = {}
    for row in pq.read_table(short_rows).to_pylist():
        prompt = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            whole = model.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)
        new = whole[0, prompt["input_ids"].shape[1] :]
        texts[row["id"]] = tokenizer.decode(new, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_the_pipeline_says_what_plain_transformers_says(
    tmp_path, capsys, short_rows, one_at_a_time, batch
):
    nightjar = Nightjar(tmp_path, capsys)
    done = nightjar.run(
        MODEL,
        short_rows,
        input__messages_column="messages",
        input__id_column="id",
        sampling__max_tokens=MAX_TOKENS,
        engine__max_num_seqs=batch,
        shards__max_rows=7,
    )
    assert done.code == 0, done.err
    assert {i: row["completion"] for i, row in done.by_id().items()} == one_at_a_time
