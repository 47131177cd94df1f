"""What is fuzzed: each target takes bytes and raises only when a promise is broken.

Untrusted bytes may be refused by the one typed error that says so, in one short line, or be read
whole; anything else (another exception, a hang, rows that differ from what a plain reading of the same
bytes gives) is a bug. `tests/unit/test_fuzz_targets.py` tries each for a moment, `python -m
tests.fuzz.run_atheris TARGET` for as long as wanted, guided by coverage.
"""

import ipaddress
import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import JobError, dump_job, load_job
from flows.yaml_text import YamlError, parse_yaml
from inference.chat import to_messages, to_tools
from inference.chat_template import RowLimit
from inference.errors import EngineConfigError, PromptError
from inference.openai_batch import read_request
from inference.prompt import PromptBuilder, PromptConfig
from inference.prompt_template import PromptTemplate
from inference.row_sampling import ROW_FIELDS, row_overrides, row_sampling
from inference.sampling import SamplingParams
from storage import formats, globs, keys, weight_files
from storage.convert import TextSource, convert, convert_arrow
from storage.endpoints import check_endpoint
from storage.errors import BadInput, CorruptObject
from storage.manifest import CommitRecord, PlanManifest, RunManifest, RunRecord
from storage.parquet_reader import ParquetInput
from storage.text_readers import read_csv, read_jsonl
from storage.text_repair import repair_text
from tasks.prepare import cells

MODEL = Path(__file__).parents[1] / "data" / "models" / "tiny-a"
_FOLDER = Path(tempfile.gettempdir())
_LONGEST_MESSAGE = 4000
_RUN = SamplingParams()


def _file(data: bytes) -> Path:
    """Put the bytes into a file; each process has one, which is written over."""
    path = _Scratch.path()
    path.write_bytes(data)
    return path


class _Scratch:
    folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def path(cls, name: str = "input") -> Path:
        if cls.folder is None:
            cls.folder = tempfile.TemporaryDirectory(prefix="nightjar-fuzz-")
        return Path(cls.folder.name) / name


def _said(error: Exception) -> None:
    """A refusal is one line that can be printed."""
    text = str(error)
    assert text, "a refusal without a word"
    assert "\n" not in text, f"a refusal of several lines: {text[:200]!r}"
    assert len(text) < _LONGEST_MESSAGE, f"a refusal of {len(text)} characters"
    text.encode()


def job_file(data: bytes) -> None:
    """A job file is refused, or means the same after it was written down and read again."""
    try:
        values = parse_yaml(data.decode("utf-8-sig"))
    except (YamlError, UnicodeDecodeError):
        return
    if not isinstance(values, dict):
        return
    base = {"model": {"source": "m"}, "input": {"uri": "i"}, "output": {"uri": "o"}}
    try:
        job = load_job({**base, **values})
    except JobError as error:
        _said(error)
        return
    stored = json.loads(json.dumps(dump_job(job)))
    assert json.dumps(dump_job(load_job(stored))) == json.dumps(dump_job(job))


def jsonl(data: bytes) -> None:
    """Every line that is a JSON object comes back as that object, every other one as an error."""
    path = _file(data)
    try:
        rows = list(read_jsonl(path, name="in.jsonl"))
    except BadInput as error:
        _said(error)
        return
    if data[:4] == b"\x28\xb5\x2f\xfd" or data[:2] == b"\x1f\x8b":
        return  # packed: what is inside is not known here
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [line.strip() for line in lines if line.strip()]
    assert len(rows) == len(expected), (len(rows), len(expected))
    for row, line in zip(rows, expected, strict=True):
        assert (row.values is None) == (row.error is not None)
        if row.values is not None:
            text = line.decode("utf-8", "surrogateescape")
            assert repr(row.values) == repr(json.loads(text))
    _converted(path, "jsonl", [row.values for row in rows])


def csv(data: bytes) -> None:
    """A CSV file is refused, or as many rows are converted as were read."""
    path = _file(data)
    try:
        rows = list(read_csv(path, name="in.csv"))
    except BadInput as error:
        _said(error)
        return
    _converted(path, "csv", [row.values for row in rows])


def _converted(path: Path, kind: str, values: list[dict[str, Any] | None]) -> None:
    names = sorted({name for row in values if row for name in row})[:3]
    source = TextSource(
        path=path, name=f"in.{kind}", format=kind, used=frozenset(names), skip_bad=True
    )
    target = _Scratch.path("converted")
    try:
        done = convert(source, target)
    except BadInput as error:
        _said(error)
        return
    assert done.num_rows == len(values)
    assert done.num_bad_rows == sum(row is None for row in values)
    table = pq.read_table(target)
    assert table.num_rows == len(values)
    records = table.combine_chunks().to_batches()
    for name in names if records else ():
        found = cells(records[0], name)
        wanted = [None if row is None else row.get(name) for row in values]
        for got, asked in zip(found, wanted, strict=True):
            _same(got, asked, is_csv=kind == "csv")


def _same(got: Any, asked: Any, *, is_csv: bool) -> None:
    """Nothing but what cannot be Unicode text may differ from what the file says."""
    if asked is None or (is_csv and asked == ""):
        assert got is None or got == asked
        return
    if is_csv:
        shown = str(got) if not isinstance(got, float) else repr(got)
        assert shown == asked or got == _number(asked) or "\ufffd" in shown, (got, asked)
        return
    text = json.dumps(asked, ensure_ascii=False)
    if any("\ud800" <= char <= "\udfff" for char in text):
        return  # replaced, counted, and refused where it is used
    assert json.dumps(got) == json.dumps(asked) or json.loads(str(got)) == asked, (got, asked)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parquet(data: bytes) -> None:
    """A Parquet file is refused by name, or every row its footer promises is read."""
    path = _file(data)
    try:
        file = ParquetInput(path, name="in.parquet")
        num_rows = min(file.num_rows, 10_000)
        seen = 0
        for batch in file.batches(0, num_rows):
            records, _ = repair_text(batch.records)
            assert batch.row_start == seen
            for name in records.schema.names:
                cells(records, name)
            seen += records.num_rows
        file.close()
        assert seen == num_rows
    except (BadInput, MemoryError) as error:
        _said(error)


def arrow(data: bytes) -> None:
    """An Arrow file or stream is refused, or becomes a Parquet file of as many rows."""
    target = _Scratch.path("converted")
    try:
        done = convert_arrow(_file(data), target, name="in.arrow")
    except BadInput as error:
        _said(error)
        return
    try:
        assert ParquetInput(target, name="in.arrow").num_rows == done.num_rows
    except BadInput as error:  # a name that is not UTF-8
        _said(error)


def detect(data: bytes) -> None:
    """Any bytes under any of our names are of a kind, or refused."""
    path = _file(data)
    for name in ("in", "in.parquet", "in.jsonl", "in.csv", "in.jsonl.gz", "in.arrow"):
        try:
            found = formats.detect(path, name=name)
        except BadInput as error:
            _said(error)
            continue
        assert found in ("parquet", "jsonl", "csv", "arrow", "openai-batch")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def messages(data: bytes) -> None:
    """Messages and tools, as text or as values, are refused or have roles and text."""
    for value in (data, data.decode("utf-8", "surrogateescape"), _json(data)):
        try:
            for message in to_messages(value):
                assert message["role"]
                assert isinstance(message.get("content", ""), str)
        except PromptError as error:
            _said(error)
        try:
            assert all(isinstance(tool, dict) for tool in to_tools(value) or [])
        except PromptError as error:
            _said(error)


def parameters(data: bytes) -> None:
    """A row's parameters are refused, or are within what the engine takes."""
    value = _json(data)
    asked = value if isinstance(value, dict) else dict.fromkeys(ROW_FIELDS, value)
    for name, item in asked.items():
        if name not in ROW_FIELDS:
            continue
        try:
            found = row_sampling(_RUN, json.loads(json.dumps(row_overrides({name: item}))))
        except PromptError as error:
            _said(error)
            continue
        assert 1 <= found.max_tokens < 2**31
        assert 0 <= found.top_k < 2**31
        assert all(0 <= token_id < 2**31 for token_id in found.stop_token_ids)
        assert 0.0 <= found.temperature <= 100.0


def request(data: bytes) -> None:
    """A line of an OpenAI batch is refused, or has exactly one kind of prompt."""
    body = _json(data)
    for url in (None, "/v1/chat/completions", "/v1/completions", body):
        try:
            found = read_request(url, body, _RUN)
        except PromptError as error:
            _said(error)
            continue
        assert (found.prompt is None) or found.messages is None
        try:
            row_sampling(_RUN, row_overrides(found.overrides))
        except PromptError as error:
            _said(error)


def prompt_template(data: bytes) -> None:
    """A template over columns is refused when it is read, or fills in values and nothing else."""
    text = data.decode("utf-8", "replace")
    try:
        template = PromptTemplate(text)
    except EngineConfigError as error:
        _said(error)
        return
    for value in ("x", b"\xff", 7, 1.5, True, None, ["a"], {"b": 1}):
        try:
            found = template.render(dict.fromkeys(template.fields, value))
        except PromptError as error:
            _said(error)
            continue
        assert len(found) <= len(text) + 20_000 * (1 + len(template.fields) + text.count("{"))
        assert "<class" not in found
        assert "object at 0x" not in found


class _Builders:
    plain: PromptBuilder | None = None

    @classmethod
    def of(cls, template: str) -> PromptBuilder:
        """A builder with this template over a tokenizer that is loaded once."""
        if cls.plain is None:
            cls.plain = PromptBuilder(MODEL, PromptConfig(max_model_len=256))
        object.__setattr__(cls.plain._template, "override", template)
        object.__setattr__(cls.plain._template, "source", template)
        return cls.plain


def _stop(*_: object) -> None:
    raise RowLimit("it takes too long")


def chat_template(data: bytes) -> None:
    """A chat template cannot leave its sandbox: it renders text, refuses the row, or runs into its limit."""
    builder = _Builders.of(data.decode("utf-8", "replace"))
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
    try:
        builder.render_messages([{"role": "user", "content": "secret"}])
    except (PromptError, RowLimit) as refusal:
        has_told = "secret" in str(refusal) and b"secret" not in data
        if has_told:
            raise AssertionError("a refusal tells the row") from refusal
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def object_key(data: bytes) -> None:
    """A key or a model's file name is refused, or stays below the folder it is joined to."""
    name = data.decode("utf-8", "surrogateescape")
    folder = _Scratch.path("model")
    folder.mkdir(exist_ok=True)
    try:
        keys.check(name)
    except ValueError as error:
        _said(error)
    else:
        assert (folder / name).resolve().is_relative_to(folder.resolve())
    try:
        assert weight_files.safe_path(folder, name).resolve().is_relative_to(folder.resolve())
        weight_files.select([name, "config.json", "model.safetensors"], source="s3://b/m")
    except BadInput as error:
        _said(error)


def safetensors(data: bytes) -> None:
    """A weight file's header is refused, or covers the file exactly."""
    try:
        weight_files.check_safetensors(_file(data), name="model.safetensors")
    except CorruptObject as error:
        _said(error)


def config_file(data: bytes) -> None:
    """A model's configuration is refused, or asks for no code."""
    path = _file(data)
    try:
        weight_files.check_small_files(path.parent, {path.name}, source="s3://b/m")
        weight_files._refuse_code(path, "config.json", "s3://b/m", ())
    except (BadInput, CorruptObject) as error:
        _said(error)
        return
    assert "auto_map" not in json.loads(data)


def record(data: bytes) -> None:
    """What is read back of a run folder is whole, or corrupt by name."""
    for kind in (CommitRecord, PlanManifest, RunManifest, RunRecord):
        try:
            kind.from_json(data, source="run.json")
        except CorruptObject as error:
            _said(error)


def glob(data: bytes) -> None:
    """A pattern is refused, or answers; the part before its first wildcard is always a prefix."""
    text = data.decode("utf-8", "replace")
    pattern, _, key = text.partition("\n")
    try:
        is_match = globs.matches(key[:200], pattern[:200])
    except BadInput as error:
        _said(error)
        return
    assert not is_match or key.startswith(globs.literal_prefix(pattern[:200]))


def endpoint(data: bytes) -> None:
    """An endpoint is refused, or leads neither to metadata nor away unencrypted."""
    url = data.decode("utf-8", "replace")
    try:
        check_endpoint(url)
    except BadInput as error:
        _said(error)
        return
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        assert parts.scheme == "https" or host == "localhost"
        return
    address = getattr(address, "ipv4_mapped", None) or address
    assert not address.is_link_local
    assert parts.scheme == "https" or address.is_loopback


TARGETS: dict[str, Callable[[bytes], None]] = {
    found.__name__: found
    for found in (
        job_file, jsonl, csv, parquet, arrow, detect, messages, parameters, request,
        prompt_template, chat_template, object_key, safetensors, config_file, record, glob, endpoint,
    )
}  # fmt: skip


def _sink(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue().to_pybytes())


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def seeds(target: str) -> list[bytes]:
    """Return inputs that reach far; both ways of fuzzing begin with them."""
    table = pa.table({"id": [1, None], "prompt": ["a", "b"], "tags": [["x"], None]})
    chat = b'[{"role": "user", "content": [{"type": "text", "text": "a"}], "name": null}]'
    found: dict[str, list[bytes]] = {
        "job_file": [
            b"name: n\nsampling: {max_tokens: 3, stop: [a, b], temperature: 0.5}\nshards: {max_rows: 2}\n",
            b"output: {uri: 'o/{date:%Y}'}\ntimezone: Europe/Berlin\ndeadline: 06:00\nbudget: {usd: 1}",
            b"a: &a [x, x]\nsampling: {stop: &b [*a, *a]}\ninput: {chat_template_kwargs: {k: *b}}\n",
            b"hardware: {placement: {env: {A: b}, job_variables: {x: 1}}, replicas: auto}\n",
            b"storage: {endpoint_url: 'https://x', server_side_encryption: AES256}\nsampling_columns: [seed]",
        ],
        "jsonl": [
            b'{"prompt": "a", "n": 1, "o": {"k": [1, 2.5, null]}}\n{"prompt": "\\ud800"}\r\n\n[1]\n{"a": 1, "a": 2}',
            b'\xef\xbb\xbf{"prompt": "b", "n": 18446744073709551615}\n{"n": -1}\n{"n": true}\n{"n": 1e400}\n',
        ],
        "csv": [b'id,prompt\n1,"a\nb"\n2,"say ""hi"""\n3,x,y\n', b"a\n1\n\n007\n1e5\n", b"\xef\xbb\xbfa,b\r\n1,2"],
        "parquet": [_sink(table), _sink(table, compression="none", use_dictionary=False, write_page_checksum=True)],
        "arrow": [_ipc(table)],
        "detect": [b"PAR1", b"ARROW1", b'{"custom_id": "a", "body": {}}\n', b"[1]", b"\x1f\x8b\x08"],
        "messages": [chat, b'[{"role": "tool", "content": {"a": 1}}]', b'[[["role", "user"], ["content", "x"]]]'],
        "parameters": [
            b'{"max_tokens": 3, "stop": ["a"], "temperature": "0.5", "ignore_eos": "true", "seed": -1}',
            b'{"stop_token_ids": [1, 2.0, "3"], "top_k": 1e3, "min_p": null}', b"[1]", b'"7"', b"1e400",
        ],
        "request": [b'{"messages": ' + chat + b', "max_tokens": 3, "n": 1, "stop": "a"}', b'{"prompt": "x"}'],
        "prompt_template": [b"Say {text} {n:03d} {{x}}", b"{a!r}", b"{a:{b}}", b"{a.b[0]:>9999}", b"{0}"],
        "chat_template": [
            b"{% for m in messages %}{{ m.role + m['content'] | upper }}{% endfor %}",
            b"{{ ''.__class__.__mro__ }}", b"{% set ns = namespace(x=1) %}{{ ns.x ** 9 }}{{ raise_exception('no') }}",
            b"{{ messages | map(attribute='content') | list | tojson }}{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1) }}",
        ],
        "object_key": [b"a/b.json", b"../x", b"/x", b"a\\b", b"a/./b", b"config.json", b"a\0b", b"a//b"],
        "safetensors": [
            (40).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, 4], "x": 1}} ' + b"\0" * 4,
            (2).to_bytes(8, "little") + b"{}",
        ],
        "config_file": [b'{"auto_map": {"AutoModel": "x.Y"}}', b'{"model_type": "qwen3"}'],
        "record": [b'{"format": 1, "run_id": "r", "rows": {}}', b'{"format": 1, "shard_id": 0, "part": {"key": "k"}}'],
        "glob": [b"a/**/*.parquet\na/b/c.parquet", b"[a-z]?x[!b]\naxxc", b"[z-a]\nz"],
        "endpoint": [b"https://s3.example.org:9000/", b"http://127.0.0.1:1", b"http://[::ffff:169.254.169.254]", b"http://u:p@h"],
    }  # fmt: skip
    return found[target]
