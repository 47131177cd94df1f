"""Metrics of a replica at work, scraped by a real Prometheus that has our rules and our dashboard's queries."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from flows.config import load_job
from inference.backends.dummy import DummyBackend
from tasks.drain import drain, new_invocation
from tasks.gpu_sample import DeviceSampler, GpuSample, open_gpu, summary
from tasks.latency import Latencies
from tasks.progress import Progress
from tasks.run import prepare
from tasks.stop import Stopped, StopSignal
from tests.ports import free_port

MONITORING = Path(__file__).parents[2] / "deployments" / "monitoring"
SCRAPED_IN_TEST = re.compile(r"nightjar_(gpu|staging|deadline|forecast)")  # need hardware or time


@contextlib.contextmanager
def replica_at_work(folder, metrics, num_rows=4000):
    lines = [json.dumps({"text": None if n == 3 else f"row {n}"}) for n in range(num_rows)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    job = load_job(
        {
            "name": "watched",
            "model": {"source": "dummy"},
            "input": {"uri": str(folder / "in.jsonl"), "prompt": "{text}"},
            "output": {"uri": str(folder / "out")},
            "engine": {"backend": "dummy", "max_num_seqs": 8},
            "shards": {"max_rows": 20},
            "metrics": metrics,
        }
    )
    (folder / "work").mkdir()
    run = prepare(job, work_dir=folder / "work", progress=Progress())
    stop = StopSignal()

    def work():
        with contextlib.suppress(Stopped):
            drain(
                run,
                invocation=new_invocation(),
                progress=Progress(),
                should_stop=stop,
                build_backend=lambda config: DummyBackend(config, step_s=0.003),
            )

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def get(url):
    with urllib.request.urlopen(url, timeout=60) as reply:
        return reply.read().decode()


def until(ask, seconds=30.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = ask()
            if found:
                return found
        time.sleep(0.1)
    raise AssertionError("nothing came")


def samples(text):
    return {
        (sample.name, sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_endpoint_tells_what_the_replica_is_doing_and_only_on_loopback(tmp_path):
    port = free_port()
    with replica_at_work(tmp_path, {"port": port, "textfile_dir": str(tmp_path / "text")}):
        url = f"http://127.0.0.1:{port}/metrics"

        def committed():
            found = samples(get(url))
            return found if found.get(("nightjar_shards", "committed"), 0) >= 2 else None

        found = until(committed)
        assert 1 <= found["nightjar_sequences_running", None] <= 8
        assert found["nightjar_completion_tokens_total", None] > 100
        assert found["nightjar_rows", "invalid_input"] == 1
        assert found["nightjar_row_latency_seconds_count", None] >= 40
        assert found["nightjar_row_latency_seconds_sum", None] > 0
        # Another address of this machine: whoever listens on all of them would answer.
        with pytest.raises(OSError, match="refused"):
            get(f"http://127.0.0.2:{port}/metrics")
    (path,) = (tmp_path / "text").glob("nightjar-*.prom")
    assert samples(path.read_text())["nightjar_shards", "committed"] >= 2
    with pytest.raises(OSError, match="refused"):
        get(url)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here")
def test_a_real_prometheus_loads_the_rules_and_answers_every_panel(tmp_path):
    port, own = free_port(), free_port()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{own}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with replica_at_work(tmp_path, {"port": port}):

            def ask(query):
                quoted = urllib.parse.quote(query)
                reply = json.loads(get(f"http://127.0.0.1:{own}/api/v1/query?query={quoted}"))
                assert reply["status"] == "success", query
                return reply["data"]["result"]

            until(lambda: ask("rate(nightjar_completion_tokens_total[5s]) > 0"))
            until(lambda: ask('nightjar_shards{state="committed"} >= 2'))
            rules = json.loads(get(f"http://127.0.0.1:{own}/api/v1/rules"))["data"]["groups"]
            written = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
            assert [r["name"] for r in rules[0]["rules"]] == [
                r["alert"] for r in written[0]["rules"]
            ]
            until(
                lambda: all(
                    r["health"] == "ok"
                    for r in json.loads(get(f"http://127.0.0.1:{own}/api/v1/rules"))["data"][
                        "groups"
                    ][0]["rules"]
                )
            )
            panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
            for panel in panels:
                for target in panel["targets"]:
                    query = target["expr"].replace("$__rate_interval", "5s")
                    found = ask(query)
                    if not SCRAPED_IN_TEST.search(query):
                        assert found, f"{panel['title']}: {query}"
    finally:
        server.terminate()
        server.wait(30)


def test_shipped_files_name_only_metrics_that_exist():
    source = (Path(__file__).parents[2] / "tasks" / "metrics.py").read_text()
    known = set(re.findall(r'"([a-z_0-9]+)"', source))
    text = (MONITORING / "alerts.yml").read_text() + (MONITORING / "grafana.json").read_text()
    for name in set(re.findall(r"nightjar_([a-z_0-9]+)", text)):
        plain = re.sub(r"_(total|bucket|timestamp_seconds)$", "", name)
        assert plain in known or f"nightjar_{plain}" in known, name


def test_latencies_are_counted_as_prometheus_has_them():
    latencies = Latencies()
    for seconds in (0.05, 0.1, 2.0, 99999.0):
        latencies.add(seconds)
    found = dict(latencies.cumulative())
    assert (found["0.1"], found["3.0"], found["3600.0"], found["+Inf"]) == (2, 3, 3, 4)


def test_a_device_that_tells_only_some_readings_gives_those():
    told = [
        GpuSample(utilisation=None, memory_bytes=5, power_w=100.0),
        GpuSample(utilisation=None, memory_bytes=7, power_w=None),
    ]
    assert summary(told) == {"peak_memory_bytes": 7, "mean_power_w": 100.0}
    assert summary([GpuSample(utilisation=None, memory_bytes=None, power_w=None)]) is None
    assert summary([]) is None


def test_a_machine_without_a_gpu_has_no_device_readings():
    handle = open_gpu()
    if handle is not None:
        pytest.skip("there is a GPU here")
    sampler = DeviceSampler(handle)
    assert sampler.take() is None
    sampler.close()
