"""Building in several processes: on this machine's cores, and on a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ragkit.indexers.__main__ import app
from ragkit.indexers.spread import Cluster, _begin, _cores, ray_cluster

import ragkit.stores.limits
from ragkit.console import run
from ragkit.errors import ModelError, SettingsError
from ragkit.models import BiEncoder
from ragkit.models.workers import parallel
from ragkit.stores.index import Index
from ragkit.types import Document
from tests.conftest import HashEncoder

DOCUMENTS = [Document(f"d{n}", f"Tin {n} melts in {n % 7} hours.") for n in range(60)]
SEGMENT = 15


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", SEGMENT)


def checksums(index: Index) -> list[dict[str, str]]:
    return [segment["files"] for segment in index.manifest["segments"]]


# --- processes that encode


@pytest.fixture(scope="module")
def encoder() -> BiEncoder:
    return BiEncoder.load("all-MiniLM-L6-v2", device="cpu", max_length=32)


def test_processes_give_the_vectors_of_one(encoder: BiEncoder) -> None:
    texts = [document.text * (1 + n % 5) for n, document in enumerate(DOCUMENTS)]
    done: list[int] = []
    with parallel(encoder, 2) as several:
        found = several.encode_documents(texts, progress=done.append)
        assert several.describe() == encoder.describe()
        assert several.encode_documents([]).shape == (0, 384)
    np.testing.assert_allclose(found, encoder.encode_documents(texts), atol=1e-6)
    assert done == sorted(done) and done[-1] == len(texts)
    with parallel(encoder, 1) as alone:
        assert alone is encoder


def test_a_process_that_is_killed_is_told_of(encoder: BiEncoder) -> None:
    with parallel(encoder, 2) as several:
        several.encode_documents(["tin"])
        pool: Any = several._pool  # type: ignore[union-attr]
        for process in list(pool._processes.values()):
            process.kill()
        with pytest.raises(ModelError, match=r"was killed.*fewer --workers"):
            several.encode_documents(["tin"])


def test_a_worker_that_finds_another_encoder_refuses(encoder: BiEncoder) -> None:
    named = BiEncoder(encoder.model, "all-MiniLM-L6-v2", document_prompt="x")
    named._identity["weights"] = "others"
    with parallel(named, 2) as several, pytest.raises(ModelError, match="is not the one that"):
        several.encode_documents(["tin"])
    gone = BiEncoder(encoder.model, "nowhere/gone")
    with parallel(gone, 2) as several, pytest.raises(ModelError, match="gone"):
        several.encode_documents(["tin"])


KILLED = """
import sys, time
from ragkit.models import BiEncoder
from ragkit.models.workers import parallel
if __name__ == "__main__":
    with parallel(BiEncoder.load("all-MiniLM-L6-v2", device="cpu"), 2) as several:
        several.encode_documents(["tin"])
        print(*several._pool._processes, flush=True)
        time.sleep(100)
"""


@pytest.mark.slow
def test_processes_end_with_the_one_that_asked_for_them(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        children = [int(each) for each in parent.stdout.readline().split()]
        parent.kill()
    assert children
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, children))


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.slow
def test_the_program_takes_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], segments: None
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in DOCUMENTS))
    command = ["build", str(corpus), "--max-length", "32"]
    assert run(app, [*command, "--index", str(tmp_path / "one")]) == 0
    assert run(app, [*command, "--index", str(tmp_path / "two"), "--workers", "2"]) == 0
    one, two = Index.open(tmp_path / "one"), Index.open(tmp_path / "two")
    rows = np.arange(len(one))
    np.testing.assert_allclose(one.dense.vectors(rows), two.dense.vectors(rows), atol=1e-6)
    for each in ("bm25/rows.npy", "documents.jsonl"):
        assert [c[each] for c in checksums(one)] == [c[each] for c in checksums(two)]
    assert run(app, [*command, "--index", str(tmp_path / "no"), "--workers", "0"]) == 2
    assert "at least 1 worker" in capsys.readouterr().err and not (tmp_path / "no").exists()
    ray = [*command, "--stores", "bm25", "--workers", "0", "--ray", "local"]
    assert run(app, [*ray, "--index", str(tmp_path / "no")]) == 2


# --- a Ray cluster


class Killing(HashEncoder):
    """An encoder that kills the process it is in, once, and notes what it encodes."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place

    def encode_documents(self, texts: list[str], **options: Any) -> Any:
        with (self._place / "encoded").open("a") as handle:
            handle.write("".join(f"{text}\n" for text in texts))
        mark = self._place / "killed"
        if not mark.exists() and any("Tin 33 " in text for text in texts):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_documents(texts, **options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs ragkit[ray]")
    root = str(Path(__file__).parents[1])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    yield
    ray.shutdown()


def test_a_cluster_builds_the_plain_index_though_a_worker_is_killed(
    tmp_path: Path, cluster: None, segments: None
) -> None:
    plain = Index.build(tmp_path / "plain", DOCUMENTS, encoder=HashEncoder())
    load = partial(Killing, tmp_path)
    told: list[tuple[str, int, int | None]] = []
    with ray_cluster("local", Cluster(workers=2, load=load, fingerprint="hash-16")) as spread:
        built = Index.build(
            tmp_path / "kb",
            DOCUMENTS,
            encoder=HashEncoder(),
            spread=spread,
            progress=lambda *each: told.append(each),
        )
    assert (tmp_path / "killed").exists()
    assert checksums(built) == checksums(plain) and built.check() == []
    assert built.manifest["encoder"] == plain.manifest["encoder"]
    assert ("segments", 4, 4) in told
    encoded = (tmp_path / "encoded").read_text().splitlines()
    repeated = {text for text in encoded if encoded.count(text) > 1}
    assert repeated <= {document.text for document in DOCUMENTS[30:45]}  # its own segment alone
    assert {*encoded} == {document.text for document in DOCUMENTS}


@pytest.mark.slow
def test_a_cluster_writes_bm25_alone(tmp_path: Path, cluster: None, segments: None) -> None:
    plain = Index.build(tmp_path / "plain", DOCUMENTS, stores=["bm25"])
    with ray_cluster("local", Cluster(workers=2)) as spread:
        built = Index.build(tmp_path / "kb", DOCUMENTS, stores=["bm25"], spread=spread)
    assert checksums(built) == checksums(plain)


class Broken(HashEncoder):
    def encode_documents(self, texts: list[str], **options: Any) -> Any:
        raise ModelError("these weights are odd")


@pytest.mark.slow
def test_what_a_worker_refuses_is_told_and_nothing_is_left(
    tmp_path: Path, cluster: None, segments: None
) -> None:
    other = partial(HashEncoder, name="other")
    for load, seen in ((Broken, "these weights are odd"), (other, "not the one that the index")):
        workers = Cluster(workers=2, load=load, fingerprint="hash-16")
        with ray_cluster("local", workers) as spread, pytest.raises(ModelError, match=seen):
            Index.build(tmp_path / "kb", DOCUMENTS, encoder=HashEncoder(), spread=spread)
        assert not (tmp_path / "kb/manifest.json").exists()
    for workers, seen in (
        (Cluster(workers=5), "has 2 CPUs, too few for 5 --workers"),
        (Cluster(workers=1, gpu=True), "has 0 GPUs, too few for 1 --workers"),
    ):
        with pytest.raises(SettingsError, match=seen), ray_cluster("local", workers):
            pass


@pytest.mark.parametrize("form", ["{}", "ray://{}", "ray://{}/"])
def test_a_cluster_that_nobody_runs_is_told_at_once(form: str) -> None:
    with socket.socket() as free:  # bound, and not listening
        free.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(SettingsError, match="cannot be reached"):
            _begin(None, address)


@pytest.mark.parametrize(
    ("sizes", "workers", "cores"),
    [([2], 2, 1), ([4, 4], 1, 4), ([4, 4, 4], 2, 4), ([8, 2], 3, 2), ([5], 2, 2), ([1, 1], 2, 1)],
)
def test_a_workers_cores_are_of_one_machine(sizes: list[int], workers: int, cores: int) -> None:
    class Ray:
        def nodes(self) -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": {"CPU": float(size)}} for size in sizes] + [
                {"Alive": False, "Resources": {"CPU": 64.0}}
            ]

    assert _cores(Ray(), Cluster(workers=workers)) == cores
