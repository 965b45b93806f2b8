"""Writers that are killed at any moment: the index is whole, as before the change or after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ragkit.stores.index import Index
from ragkit.types import Document

CONFTEST = Path(__file__).parents[1] / "conftest.py"
# A process that has imported everything forks a writer whenever it is told to, and kills it. The
# writer notes what each change starts from and leads to: [name of the encoder, ids and texts].
WRITER = """
import json, os, random, runpy, signal, sys, time, traceback
import ragkit.stores.embeddings, ragkit.stores.limits
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.index import Index
from ragkit.types import Document

path, log, conftest = sys.argv[1:4]
Encoder = runpy.run_path(conftest)["HashEncoder"]
ragkit.stores.limits.SEGMENT_DOCUMENTS = 6
ragkit.stores.embeddings._WINDOW = 3

def build(documents, name="one"):
    ann = AnnSettings("hnsw")
    return Index.build(path, documents, encoder=Encoder(name=name), ann=ann, replace=True)

def changes(rng, index):
    old, name = list(index.documents), index.manifest["encoder"]["name"]
    encoder, number = Encoder(name=name), max(int(d.id) for d in old) + 1
    new = [Document(str(number + n), f"moon {rng.random()}") for n in range(rng.randint(1, 9))]
    some = rng.sample(old, rng.randint(1, max(1, len(old) // 2)))
    edited = [Document(d.id, f"sun {rng.random()}") for d in some]
    gone = {d.id for d in some}
    rest = [d for d in old if d.id not in gone]
    other = "two" if name == "one" else "one"
    yield name, old + new, lambda: index.add(new, encoder=encoder)
    yield name, rest + edited, lambda: index.add(edited, encoder=encoder, update=True)
    if rest:
        yield name, rest, lambda: index.delete(gone)
        yield name, rest, lambda: index.delete(gone)
    yield name, old, index.compact
    yield other, old, lambda: index.refresh(Encoder(name=other))
    yield "one", new, lambda: build(new)

def state(name, documents):
    return [name, [[d.id, d.text] for d in documents]]

def write(seed):
    rng = random.Random(seed)
    with open(log, "w") as note:
        while True:
            index = Index.open(path)
            before = state(index.manifest["encoder"]["name"], index.documents)
            name, after, change = rng.choice(list(changes(rng, index)))
            print(json.dumps([before, state(name, after)]), file=note, flush=True)
            change()

build([Document(str(n), f"moon {n}") for n in range(10)])
print("ready", flush=True)
for line in sys.stdin:
    seed, seconds = json.loads(line)
    child = os.fork()
    if not child:
        try:
            write(seed)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def killed(path, log, count, seed):
    """Kill writers of an index, and yield after each."""
    rng = np.random.default_rng(seed)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(log), str(CONFTEST)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as writer:  # fmt: skip
        assert writer.stdout.readline() == "ready\n"
        for number in range(count):
            order = json.dumps([1000 * seed + number, rng.uniform(0.01, 0.5)])
            print(order, file=writer.stdin, flush=True)
            assert writer.stdout.readline() == "9\n"  # it was killed, and did not end by itself
            yield
        writer.stdin.close()


def check(path, log, encoder):
    index = Index.open(path)
    assert index.check() == []
    documents = list(index.documents)
    held = [index.manifest["encoder"]["name"], [[d.id, d.text] for d in documents]]
    noted = log.read_text().splitlines()
    assert not noted or held in json.loads(noted[-1])
    vectors = encoder().encode_queries([document.contents for document in documents])
    np.testing.assert_array_equal(index.dense.vectors(np.arange(len(documents))), vectors)
    rows, _ = index.bm25.search([documents[-1].text.split()[-1]], 1)
    assert rows[0].tolist() == [len(documents) - 1]
    return len(noted)


@pytest.mark.parametrize(("count", "seed"), [(24, 0), pytest.param(250, 1, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_the_index_of_before_or_after(tmp_path, hash_encoder, count, seed):
    path, log, changes, left = tmp_path / "kb", tmp_path / "log", 0, 0
    log.touch()
    for _ in killed(path, log, count, seed):
        changes += check(path, log, hash_encoder)
        left += len(list(path.glob("segments/.new-*")))
    assert changes > count / 2 and left > count / 8  # they were killed amid changes
    # What they left is in nobody's way, and the next writer takes it away.
    encoder = hash_encoder(name=Index.open(path).manifest["encoder"]["name"])
    index = Index.open(path).add([Document("last", "tin")], encoder=encoder)
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files == {"manifest.json", *index.files()}
