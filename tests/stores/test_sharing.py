"""Many processes read an index while another one changes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ragkit.errors import IndexStateError
from ragkit.stores.index import Index
from ragkit.types import Document

CONFTEST = Path(__file__).parents[1] / "conftest.py"
COUNT, CHANGES = 12, 25
# Every state holds COUNT documents of one version, the ids of an odd one in other order, so that a
# reader that saw parts of two states would see two versions, or rows of another state.
SHARED = """
import json, runpy, sys
import numpy as np
from ragkit.errors import IndexStateError
from ragkit.stores.index import Index
from ragkit.types import Document

path, conftest, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[3])
encoder = runpy.run_path(conftest)["HashEncoder"]()

def documents(version):
    return [Document(str(n), f"moon{n} version{version}") for n in range(COUNT)]

def seen(index):
    "Return the version that an index shows in all its stores, or fail."
    held = list(index.documents)
    (version,) = {int(d.text.rpartition("version")[2]) for d in held}
    assert sorted(d.id for d in held) == sorted(map(str, range(COUNT))), held
    rows, _ = index.bm25.search([f"version{version}", f"version{version + 1}"], 99)
    assert (len(rows[0]), len(rows[1])) == (COUNT, 0), rows
    vectors = encoder.encode_queries([d.contents for d in held])
    found, _ = index.dense.search(vectors, 1)
    assert [row.tolist() for row in found] == [[n] for n in range(COUNT)], found
    return version
"""
READER = """
print("ready", flush=True)
versions, replaced, kept = [], 0, 0
old, first = None, None
while not versions or versions[-1] < int(sys.argv[4]):
    index = Index.open(path)
    try:
        versions.append(seen(index))
    except IndexStateError as error:  # changed between two of its reads: told, never torn
        assert "replaced since it was opened" in str(error), error
        replaced += 1
        continue
    if old is not None:
        assert seen(old) == first  # what was opened is a snapshot
        kept += 1
    if len(versions) % 3 == 1:
        old, first = index, versions[-1]
print(json.dumps([versions, replaced, kept]), flush=True)
"""
WRITER = """
for version in range(1, int(sys.argv[4]) + 1):
    Index.open(path).add(documents(version), encoder=encoder, update=True)
    if version % 5 == 0:
        Index.open(path).compact()
"""
HOLDER = """
from ragkit.stores.folder import staging
from pathlib import Path
with staging(Path(path), replace=True):
    print("locked", flush=True)
    sys.stdin.read()
"""


def process(path, code):
    command = [sys.executable, "-c", SHARED + code, str(path), str(CONFTEST), str(COUNT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(CHANGES)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip


@pytest.fixture
def kb(tmp_path, hash_encoder):
    documents = [Document(str(n), f"moon{n} version0") for n in range(COUNT)]
    Index.build(tmp_path / "kb", documents, encoder=hash_encoder())
    return tmp_path / "kb"


def test_readers_see_whole_states_while_a_writer_commits(kb):
    readers = [process(kb, READER) for _ in range(3)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    with process(kb, WRITER) as writer:
        _, error = writer.communicate(timeout=120)
    assert writer.returncode == 0, error
    between = 0
    for reader in readers:
        with reader:
            out, error = reader.communicate(timeout=120)
        assert reader.returncode == 0, error
        versions, _, kept = json.loads(out)
        assert versions == sorted(versions) and versions[-1] == CHANGES
        assert kept > 0
        between += len(set(versions)) - 2
    assert between > CHANGES / 4  # they read while it wrote


def test_a_second_writer_is_refused_until_the_first_one_ends_or_dies(kb, hash_encoder):
    for end in (signal.SIGKILL, signal.SIGTERM):
        with process(kb, HOLDER) as holder:
            assert holder.stdout.readline() == "locked\n"
            for change in (
                lambda: Index.open(kb).delete(["0"]),
                lambda: Index.open(kb).add([Document("x", "tin")], encoder=hash_encoder()),
                lambda: Index.open(kb).refresh(hash_encoder(name="other")),
                lambda: Index.build(kb, [Document("x", "tin")], stores=["bm25"], replace=True),
            ):
                with pytest.raises(IndexStateError, match="another build of this index is running"):
                    change()
            assert len(Index.open(kb)) == COUNT
            holder.send_signal(end)
            holder.wait(timeout=30)
        assert len(Index.open(kb).delete(["0"])) == COUNT - 1
        Index.open(kb).add([Document("0", "moon0 version0")], encoder=hash_encoder())
