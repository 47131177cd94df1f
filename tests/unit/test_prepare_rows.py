import json
from pathlib import Path

import pyarrow as pa
import pytest

from inference.prompt import PromptBuilder, PromptConfig
from inference.prompt_template import PromptTemplate
from inference.sampling import SamplingParams
from storage.convert import ERROR, JSON_PREFIX
from tasks.feed_batches import from_rows, to_rows
from tasks.frames import ENCODING, Recorder
from tasks.prepare import RowPreparer, cells
from tasks.prompt_columns import PromptColumns

MODEL = Path(__file__).parent.parent / "data" / "models" / "tiny-a"
RUN = SamplingParams(max_tokens=8)
MESSAGES = [{"role": "user", "content": "hi"}]
PAIRS = pa.map_(pa.string(), pa.string())
SWAPPED = pa.struct([("content", pa.string()), ("role", pa.string()), ("name", pa.string())])


@pytest.fixture(scope="module")
def builder():
    return PromptBuilder(MODEL, PromptConfig(max_model_len=256))


@pytest.fixture
def recorder():
    made = Recorder()
    yield made
    made.close()


@pytest.fixture
def prepare(builder, recorder):
    def run(columns, *, row_start=0, poison=(), careful=False, **arrays):
        preparer = RowPreparer(
            columns,
            builder,
            RUN,
            recorder=recorder,
            row_cpu_s=5,
            max_hard_rows=1,
            on_hard_row=lambda: None,
        )
        records = pa.RecordBatch.from_pydict(arrays)
        return preparer.prepare(
            records, {}, row_start=row_start, poison=dict(poison), careful=careful
        )

    return run


def columns(kind="text", prompt="prompt", *, template=None, key=None, sampling=()):
    parsed = PromptTemplate(template) if template else None
    return PromptColumns(kind, prompt, parsed, None, key, sampling)


CHAT = columns("messages", "messages")


@pytest.mark.parametrize(
    "array",
    [
        pa.array([MESSAGES]),
        pa.array([MESSAGES], pa.list_(SWAPPED)),
        pa.array([MESSAGES], pa.large_list(SWAPPED)),
        pa.array([[[("role", "user"), ("content", "hi")]]], pa.list_(PAIRS)),
        pa.array([json.dumps(MESSAGES)]),
        pa.array([json.dumps(MESSAGES)], pa.large_string()),
        pa.array([json.dumps(MESSAGES)], pa.string_view()),
        pa.array([json.dumps(MESSAGES)]).dictionary_encode(),
        pa.array([json.dumps(MESSAGES).encode()]),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(MESSAGES)])),
        pa.array([[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]]),
    ],
    ids=lambda array: str(array.type)[:40],
)
def test_every_form_of_messages_gives_the_same_tokens(prepare, builder, array):
    (row,) = prepare(CHAT, messages=array)
    (expected,) = builder.encode([builder.render_messages(MESSAGES)])
    assert (row.state, row.token_ids) == (None, expected)


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["hi"], pa.large_string()),
        pa.array(["hi"]).dictionary_encode(),
        pa.array([b"hi"]),
    ],
    ids=lambda array: str(array.type)[:20],
)
def test_every_form_of_text_gives_the_same_tokens(prepare, builder, array):
    (row,) = prepare(columns(), prompt=array)
    assert row.token_ids == builder.encode([builder.render_text("hi")])[0]


def test_exact_json_beside_a_column_is_what_the_prompt_is_made_of(prepare, builder):
    filled = pa.array([[{"role": "user", "content": "other"}]])
    raw = pa.array([json.dumps(MESSAGES)])
    (row,) = prepare(CHAT, messages=filled, **{JSON_PREFIX + "messages": raw})
    assert row.token_ids == builder.encode([builder.render_messages(MESSAGES)])[0]


def test_rows_fail_one_by_one_and_stay_in_place(prepare):
    rows = prepare(
        columns(sampling=("seed",)),
        row_start=100,
        poison={103: "known to kill"},
        prompt=pa.array(["a", None, "b" * 300, "c", "d", "e"]),
        seed=pa.array([1, 1, 1, 1, None, 7]),
        **{ERROR: pa.array([None, None, None, None, "line 5: not JSON", None])},
    )
    assert [row.index for row in rows] == list(range(100, 106))
    states = [row.state for row in rows]
    bad = "invalid_input"
    assert states == [None, bad, "overlong", bad, bad, None]
    assert rows[3].error == "known to kill"
    assert rows[4].error == "line 5: not JSON"
    assert rows[5].overrides == {"seed": 7}


def test_careful_rows_are_the_same_rows(prepare):
    prompts = pa.array(["a", "bb", "ccc"])
    quick, careful = (prepare(columns(), careful=c, prompt=prompts) for c in (False, True))
    assert [row.token_ids for row in quick] == [row.token_ids for row in careful]


def test_the_recorder_names_the_row_being_encoded(prepare, recorder, builder, monkeypatch):
    seen = []
    real = builder.encode
    monkeypatch.setattr(
        builder, "encode", lambda texts: (seen.append(recorder.read()), real(texts))[1]
    )
    prepare(columns(), row_start=7, careful=True, prompt=pa.array(["a", None, "b"]))
    assert seen == [(ENCODING, 7, 8), (ENCODING, 9, 10)]


def test_a_template_reads_its_columns(prepare, builder):
    asked = columns("template", None, template="{a}-{b}")
    (row,) = prepare(asked, a=pa.array([1]), b=pa.array(["x"]))
    assert row.token_ids == builder.encode([builder.render_text("1-x")])[0]


def test_rows_survive_the_pipe(prepare):
    rows = prepare(
        columns(key="id", sampling=("stop", "max_tokens")),
        row_start=5,
        prompt=pa.array(["a", None, "c"]),
        id=pa.array(["k", "l", None]),
        stop=pa.array([["x", "y"], None, None]),
        max_tokens=pa.array([None, 3, None]),
    )
    kept = pa.RecordBatch.from_pydict({"n": pa.array([1, None, 3])})
    batch = from_rows(to_rows(rows, kept), 5, RUN)
    assert batch.columns.equals(kept)
    assert [list(row.token_ids) for row in batch.rows] == [row.token_ids for row in rows]
    assert [row.row_key for row in batch.rows] == ["k", "l", 7]
    assert [row.row_index for row in batch.rows] == [5, 6, 7]
    assert batch.rows[0].sampling == SamplingParams(max_tokens=8, stop=("x", "y"))
    assert batch.rows[1].sampling is batch.rows[2].sampling is RUN
    assert [row.num_prompt_tokens for row in batch.rows] == [
        len(rows[0].token_ids),
        None,
        len(rows[2].token_ids),
    ]


def test_a_batch_without_rows_or_columns_survives_the_pipe(prepare):
    empty = from_rows(to_rows([], pa.RecordBatch.from_pydict({})), 0, RUN)
    assert (empty.rows, empty.columns.num_columns) == ([], 0)


def test_a_column_that_is_not_there_is_nulls():
    records = pa.RecordBatch.from_pydict({"a": [1, 2]})
    assert cells(records, "b") == [None, None]


def test_a_timestamp_beyond_python_is_text():
    records = pa.RecordBatch.from_pydict({"t": pa.array([10**17], pa.timestamp("s"))})
    assert isinstance(cells(records, "t")[0], str)


def test_a_refusal_that_quotes_half_a_character_or_a_line_break_can_be_stored(prepare):
    part = {"type": "image\ud800\nurl"}
    (row,) = prepare(CHAT, messages=[json.dumps([{"role": "user", "content": [part]}])])
    assert row.state == "invalid_input"
    assert row.error == r"message 0 has content of type image\ud800\nurl"
    schema = pa.schema([pa.field("messages", pa.string())])
    batch = pa.RecordBatch.from_arrays([pa.array(["x"])], schema=schema)
    assert from_rows(to_rows([row], batch), 0, RUN).rows[0].error == row.error
