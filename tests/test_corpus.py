import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.artefacts import to_json
from ragkit.corpus import (
    Problem,
    read_documents,
    read_qrels,
    read_questions,
    read_run,
    write_documents,
    write_qrels,
    write_questions,
    write_run,
)
from ragkit.errors import DataError, MissingExtra, SettingsError
from ragkit.fields import document_record
from ragkit.stores.documents import document_line
from ragkit.types import Document, Example, Query


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        lines = content if isinstance(content, list) else [content]
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        content = "".join(text + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*paths):
    return list(read_documents(paths))


def skipped(*paths):
    problems = []
    return list(read_documents(paths, on_error="skip", problems=problems)), problems


# --- documents of records


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_with_every_alias(tmp_path, name):
    records = [
        {"id": "1", "text": "one", "title": "T", "metadata": {"a": 1}, "url": "u"},
        {"_id": 2, "contents": "two"},
        {"docid": "3", "document_text": "three", "title": None},
        {"doc_id": "4", "page_content": "four", "metadata": None},
        {"docno": "5", "body": "five"},
        {"passage_id": "6", "text": " six\u2028 ", "contents": "kept"},
        {"psg_id": "7", "text": "seven", "metadata": "a string"},
    ]
    assert read(write(tmp_path / name, records)) == [
        Document("1", "one", "T", {"a": 1, "url": "u"}),
        Document("2", "two"),
        Document("3", "three"),
        Document("4", "four"),
        Document("5", "five"),
        Document("6", " six\u2028 ", "", {"contents": "kept"}),
        Document("7", "seven", "", {"metadata": "a string"}),
    ]


def test_the_first_line_of_flashrag_contents_is_the_title(tmp_path):
    contents = ['"Aaron"\nA prophet.\nMore.', "Aaron\nA prophet.", "One line", "x" * 201 + "\ny"]
    records = [{"id": str(i), "contents": text} for i, text in enumerate(contents)]
    records.append({"id": "4", "contents": "Not\nsplit", "title": "Own"})
    found = [(d.title, d.text) for d in read(write(tmp_path / "a.jsonl", records))]
    assert found == [
        ("Aaron", "A prophet.\nMore."),
        ("Aaron", "A prophet."),
        ("", "One line"),
        ("", "x" * 201 + "\ny"),
        ("Own", "Not\nsplit"),
    ]


def test_tables(tmp_path):
    dpr = write(
        tmp_path / "psgs.tsv", ["id\ttext\ttitle", '1\t"Aaron (""A"") is"\tAaron', "2\tb\t"]
    )
    assert read(dpr) == [Document("1", 'Aaron ("A") is', "Aaron"), Document("2", "b")]
    marco = write(tmp_path / "collection.tsv.gz", ['7\t"quoted" and not', "8\tplain"])
    assert read(marco) == [Document("7", '"quoted" and not'), Document("8", "plain")]
    comma = write(tmp_path / "a.csv", 'ID,Text,Year\n1,"two\nlines, ""q""",1999\n2,b,2000')
    assert read(comma) == [
        Document("1", 'two\nlines, "q"', "", {"Year": "1999"}),
        Document("2", "b", "", {"Year": "2000"}),
    ]


def test_json_lists_give_the_lines_of_their_records(tmp_path):
    text = '\ufeff [\n {"id": "a", "text": "x"},\n\n {"id": "a",\n "text": "y"}, 3,\n {"id" "c"}\n]'
    documents, problems = skipped(write(tmp_path / "a.json", text))
    assert documents == [Document("a", "x")]
    assert [problem.line for problem in problems] == [4, 5, 6]
    assert "duplicate id 'a', first seen in " in problems[0].message
    assert problems[0].message.endswith("a.json:2")
    assert "saw int" in problems[1].message
    assert "broken JSON" in problems[2].message
    line = write(tmp_path / "b.json", '[{"id": 1, "text": "x"}, {"id": 2, "text": 1e999}]')
    with pytest.raises(DataError, match=r"b\.json:1: broken JSON: 1e999 is not"):
        read(line)


def test_of_a_list_on_one_line_the_record_is_named(tmp_path):
    path = write(tmp_path / "a.json", '[{"id": "1", "text": "x"}, {"id": "1", "text": "y"}]')
    with pytest.raises(DataError, match=r":1: duplicate id '1' of record 2, first seen in .*:1$"):
        read(path)
    with pytest.raises(DataError, match=r":1: duplicate id '1' of record 2, first seen in line 1"):
        read_questions(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x" "text": "y"}', "broken JSON: Expecting ',' delimiter (column 12)"),
        ("[" * 100_000, "broken JSON"),
        ('{"id": "x", "text"', "broken JSON: Expecting ':' delimiter (column 19)"),
        ('{"id": "x", "text": "y", "m": NaN}', "NaN is not a JSON value"),
        ('{"id": "x", "text": "y", "m": -1e999}', "-1e999 is not a JSON value"),
        ('["x"]', "expected a JSON object, saw list"),
        ("{}", "no id: looked for id, _id"),
        ('{"id": "x", "txt": "y"}', "no text: looked for text, contents, document_text"),
        ('{"id": "x", "txt": "y"}', "saw id, txt"),
        ('{"id": 1.5, "text": "y"}', "'id' holds 1.5, expected a string"),
        ('{"id": true, "text": "y"}', "'id' holds true"),
        ('{"id": " ", "text": "y"}', "'id' is empty"),
        ('{"id": "x", "text": ["y"]}', "'text' holds [\"y\"], expected a string"),
        ('{"id": "x", "text": " \\n"}', "'text' is empty"),
        ('{"id": "x", "text": "y", "title": 7}', "'title' holds 7"),
        ('{"id": "x", "text": "\\uD800"}', "lone surrogate \\ud800"),
        ('{"id": "ok", "text": "y"}', "duplicate id 'ok', first seen in"),
        (b'{"id": "x", "text": "\xe9"}', "not UTF-8: byte 0xe9 at offset 21 of the line"),
    ],
)
def test_problems_of_records_stop_or_are_skipped(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    good = [b'{"id": "ok", "text": "a\\u0000"}\n', b"\n", line + b"\r\n"]
    path = write(tmp_path / "a.jsonl", b"".join(good) + b'{"id": "2", "text": "\\ud83d\\ude00"}')
    documents, problems = skipped(path)
    assert documents == [Document("ok", "a\0"), Document("2", "😀")]
    assert [(problem.source, problem.line) for problem in problems] == [(str(path), 3)]
    assert message in problems[0].message
    assert str(problems[0]) == f"{path}:3: {problems[0].message}"
    stream = read_documents([path])
    assert next(stream).id == "ok"
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value) == str(problems[0])


def test_duplicates_are_found_across_files(tmp_path):
    a = write(tmp_path / "a.tsv", ["1\tx", "2\ty"])
    b = write(tmp_path / "b.tsv", ["3\tx", "2\tz"])
    with pytest.raises(DataError, match=r"b\.tsv:2: duplicate id '2', first seen in .*a\.tsv:2$"):
        read(a, b)
    note = write(tmp_path / "note.txt", "text")
    c = write(tmp_path / "c.tsv", ["note.txt\tx"])
    with pytest.raises(DataError, match=r"first seen in .*note\.txt$"):
        read(note, c)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.json", b"[]", "the list is empty"),
        ("a.json", b'[{"id": "1", "text": "x"} 2]', "expected ',' or ']'"),
        ("a.tsv", b"id\ttext\n", "nothing after the header"),
        ("a.tsv", b"id\ttext\ttext\n1\tx\ty\n", "two columns of the same name"),
        ("a.tsv", b"1\t2\t3\t4\n", "4 columns and no header"),
        ("a.tsv", b"id\ttext\n1\tx\ty\n", "a.tsv:2: 3 fields where there are 2 columns"),
        ("a.tsv", b"name\ttext\n1\tx\n", "a.tsv:2: no id: looked for"),
        ("a.csv", b'id,text\n1,"x\n', "a.csv:2: broken CSV"),
        ("a.exe", b"x", "unknown suffix; what can be read: .jsonl"),
        ("a.txt", b" ", "holds no text"),
        ("a.txt", b"a\nb\xff", "not UTF-8 (byte 0xff at offset 3, line 2)"),
        ("a.pdf", b"%PDF-1.4 junk", "cannot be parsed as .pdf"),
        ("a.docx", b"junk", "cannot be parsed as .docx"),
        ("a.jsonl.gz", b"junk", "damaged gzip"),
    ],
)
def test_problems_of_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    _, problems = skipped(path)
    assert message in str(problems[0])


def test_missing_files_and_truncated_gzip(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "none")
    path = write(
        tmp_path / "a.jsonl.gz", [{"id": str(i), "text": os.urandom(20).hex()} for i in range(9999)]
    )
    path.write_bytes(path.read_bytes()[:200_000])
    documents, problems = skipped(path)
    assert documents
    assert f"after line {len(documents)}" in problems[0].message


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_unreadable_files(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}")
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        read(path)


def test_options_are_checked_before_reading():
    with pytest.raises(SettingsError, match="on_error='ignore'"):
        read_documents([], on_error="ignore")


def test_reading_streams(tmp_path):
    path = write(tmp_path / "a.jsonl", ['{"id": "1", "text": "x"}'] * 1 + ["broken"] * 5)
    assert next(read_documents([path])) == Document("1", "x")


# --- folders


def test_folders_are_walked_in_order_without_hidden_files_and_links_out(tmp_path):
    outside = write(tmp_path / "outside" / "secret.txt", "secret")
    kb = tmp_path / "kb"
    for name in ["b.txt", "a/z.md", "a/b.txt", ".hidden.txt", ".git/x.txt", "pic.png", "a/x.png"]:
        write(kb / name, f"text of {name}")
    write(kb / "c.jsonl", {"id": "r", "text": "record"})
    (kb / "link.txt").symlink_to(outside)
    (kb / "folder").symlink_to(outside.parent)
    (kb / "within.txt").symlink_to(kb / "b.txt")
    found = read(kb)
    assert [d.id for d in found] == ["b.txt", "r", "within.txt", "a/b.txt", "a/z.md"]
    assert found[3] == Document("a/b.txt", "text of a/b.txt\n", "b", {"source": "a/b.txt"})
    documents, problems = skipped(kb)
    assert documents == found
    assert [str(p) for p in problems] == [
        f"{kb}: files of unknown suffix were passed over: .png (2)"
    ]


def test_a_folder_without_anything_to_read_is_a_problem(tmp_path):
    write(tmp_path / "a.png", "x")
    with pytest.raises(DataError, match=r"nothing in this folder can be read; .*\.jsonl"):
        read(tmp_path)


def test_of_a_beir_folder_only_the_corpus_is_read(tmp_path):
    write(tmp_path / "corpus.jsonl.gz", {"_id": "1", "title": "t", "text": "x"})
    write(tmp_path / "queries.jsonl", {"_id": "q", "text": "y"})
    write(tmp_path / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "q\t1\t1"])
    assert read(tmp_path) == [Document("1", "x", "t")]


# --- documents of files


def test_markdown(tmp_path):
    text = "---\ntags: [a]\ntitle: 'From the front'\n---\n# Heading\n\nText.\n"
    document = read(write(tmp_path / "a.md", text.encode()))[0]
    assert (document.title, document.text) == ("From the front", "# Heading\n\nText.\n")
    text = "---\n\nA rule, no front matter.\n\n---\n```\n# code\n```\n# About C#\r\nText."
    document = read(write(tmp_path / "a.md", text.encode()))[0]
    assert (document.title, document.text) == ("About C#", text.replace("\r", ""))
    assert read(write(tmp_path / "plain.md", "text"))[0].title == "plain"


def test_html(tmp_path):
    html = """<html><head><title>The
      title</title><style>p {}</style></head><body><nav>menu</nav><h1>Head</h1>
      <p>One <b>bo</b>ld
      word<br>next</p><script>x()</script><!-- no -->
      <ul><li>a</li><li>b &amp; c</li></ul>
      <table><tr><th>k</th><td>v</td></tr><tr><td>1<td>2</table><pre>x = 1
y</pre></body></html>"""
    document = read(write(tmp_path / "a.html", html))[0]
    assert document == Document(
        "a.html",
        "Head\n\nOne bold word\nnext\n\na\nb & c\n\nk | v\n1 | 2\n\nx = 1\ny",
        "The title",
        {"source": "a.html"},
    )
    assert read(write(tmp_path / "b.htm", "<h1>Only <i>this</i></h1>"))[0].title == "Only this"


def pdf_bytes(texts, title=""):
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in texts:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        kids.append(f"{len(objects) + 1} 0 R")
        font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] "
            f"/Contents {len(objects) + 2} 0 R "
            f"/Resources << /Font << /F1 {font} >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    objects.append(f"<< /Title ({title}) >>")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    start = len(data)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    data += b"".join(f"{offset:010d} 00000 n \n".encode() for offset in offsets)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    return data + f"trailer\n{trailer}\nstartxref\n{start}\n%%EOF\n".encode()


def test_pdf(tmp_path):
    path = write(tmp_path / "a.pdf", pdf_bytes(["Page one.", "Page two."], "A title"))
    metadata = {"source": "a.pdf", "pages": 2}
    assert read(path) == [Document("a.pdf", "Page one.\n\nPage two.", "A title", metadata)]
    assert read(write(tmp_path / "b.pdf", pdf_bytes(["Text."])))[0].title == "b"
    with pytest.raises(DataError, match="holds no text"):
        read(write(tmp_path / "scan.pdf", pdf_bytes([""])))


@pytest.mark.parametrize("password", ["", "secret"])
def test_encrypted_pdf(tmp_path, password):
    pypdf = pytest.importorskip("pypdf")
    source = write(tmp_path / "plain.pdf", pdf_bytes(["Text."]))
    writer = pypdf.PdfWriter(clone_from=source)
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    path = tmp_path / "a.pdf"
    writer.write(path)
    if password:
        with pytest.raises(DataError, match=r"a\.pdf: the PDF is encrypted"):
            read(path)
    else:
        assert read(path)[0].text == "Text."


def test_word(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.core_properties.title = ""
    document.add_paragraph("Before.")
    document.add_heading("The heading", 1)
    table = document.add_table(2, 2)
    for index, cell in enumerate(c for row in table.rows for c in row.cells):
        cell.text = str(index)
    table.cell(1, 0).merge(table.cell(1, 1))
    document.add_paragraph("After.")
    document.save(tmp_path / "a.docx")
    text = "Before.\n\nThe heading\n\n0 | 1\n2\n3\n\nAfter."
    assert read(tmp_path / "a.docx") == [
        Document("a.docx", text, "The heading", {"source": "a.docx"})
    ]
    document.core_properties.title = "Own title"
    document.save(tmp_path / "a.docx")
    assert read(tmp_path / "a.docx")[0].title == "Own title"


@pytest.mark.parametrize(
    ("module", "name"), [("bs4", "a.html"), ("pypdf", "a.pdf"), ("docx", "a.docx")]
)
def test_a_missing_parser_is_never_skipped(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"ragkit\[documents\]"):
        skipped(write(tmp_path / name, "x"))


# --- questions


def test_questions_with_every_alias(tmp_path):
    records = [
        {"_id": 1, "text": "a?", "answers": ["x", " ", "y"], "metadata": {"split": "dev"}},
        {"qid": "2", "query": "b?", "golden_answers": "x", "where": {"year": 2000}},
        {"question": "c?", "target": None},
        {"question_id": "4", "question": "d?", "answer": []},
    ]
    assert read_questions(write(tmp_path / "q.jsonl.gz", records)) == [
        Example(Query("1", "a?"), answers=("x", "y")),
        Example(Query("2", "b?", {"year": 2000}), answers=("x",)),
        Example(Query("q3", "c?")),
        Example(Query("4", "d?")),
    ]


def test_tevatron_and_dpr_training_data(tmp_path):
    tevatron = {
        "query_id": "1",
        "query": "a?",
        "positive_passages": [{"docid": 7, "title": "T", "text": "p"}],
        "negative_passages": [{"docid": "8", "title": "", "text": "n"}],
        "answers": ["x"],
    }
    assert read_questions(write(tmp_path / "t.jsonl", tevatron)) == [
        Example(Query("1", "a?"), (Document("7", "p", "T"),), (Document("8", "n"),), ("x",))
    ]
    contexts = [{"title": "T", "text": "p", "psg_id": str(i), "score": 1.5} for i in range(3)]
    dpr = [
        {
            "question": f"{q}?",
            "answers": ["x"],
            "positive_ctxs": contexts[:1],
            "negative_ctxs": contexts[1:2],
            "hard_negative_ctxs": contexts[2:],
        }
        for q in "ab"
    ]
    documents = [Document(str(i), "p", "T", {"score": 1.5}) for i in range(3)]
    expected = (tuple(documents[:1]), (documents[2], documents[1]), ("x",))
    assert read_questions(write(tmp_path / "d.json", json.dumps(dpr, indent=1))) == [
        Example(Query("q1", "a?"), *expected),
        Example(Query("q2", "b?"), *expected),
    ]


def test_passages_without_ids_are_named_after_their_contents(tmp_path):
    records = [
        {"query": "a?", "pos": ["same"], "neg": ["other"]},
        {"query": "b?", "pos": ["same", {"text": "same", "title": "T"}]},
    ]
    first, second = read_questions(write(tmp_path / "q.jsonl", records))
    assert first.positives[0] == second.positives[0]
    assert len({d.id for d in (*second.positives, *first.negatives)}) == 3


def test_tables_of_questions(tmp_path):
    assert read_questions(write(tmp_path / "a.tsv", ["10\twhat?", "11\twho?"])) == [
        Example(Query("10", "what?")),
        Example(Query("11", "who?")),
    ]
    rows = ["what?\t['it', \"it's\"]", 'who?\t["me"]', 'why?\t"[""so""]"', "how?\t[]"]
    assert read_questions(write(tmp_path / "nq-test.qa.csv", rows)) == [
        Example(Query("q1", "what?"), answers=("it", "it's")),
        Example(Query("q2", "who?"), answers=("me",)),
        Example(Query("q3", "why?"), answers=("so",)),
        Example(Query("q4", "how?")),
    ]
    rows = ["Question,Answer,year", '"what, then?",it,2000']
    assert read_questions(write(tmp_path / "c.csv", rows)) == [
        Example(Query("q2", "what, then?"), answers=("it",))
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"qid": "1", "question": " "}, "'question' is empty"),
        ({"qid": "1"}, "no question: looked for question, query, text; saw qid"),
        ({"qid": "1", "query": "a", "answer": 0}, "'answer' holds 0, expected strings"),
        ({"qid": "1", "query": "a", "answers": [1]}, "'answers' holds [1], expected strings"),
        ({"qid": "1", "query": "a", "where": "x"}, "'where' holds \"x\", expected an object"),
        ({"qid": "ok", "query": "a"}, "duplicate id 'ok', first seen in line 1"),
        ({"qid": "1", "query": "a", "pos": [{"id": "1"}]}, "in 'pos': no text"),
        ({"qid": "1", "query": "a", "pos": [1]}, "'pos' holds 1, expected documents"),
    ],
)
def test_problems_of_questions(tmp_path, record, message):
    path = write(tmp_path / "q.jsonl", [{"qid": "ok", "query": "a?"}, record])
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)
    problems: list[Problem] = []
    assert len(read_questions(path, on_error="skip", problems=problems)) == 1
    assert str(problems[0]) == str(caught.value)


def test_question_files_of_other_kinds(tmp_path):
    for path, message in [
        (tmp_path, "no file of records"),
        (write(tmp_path / "a.pdf", "x"), "no file of records"),
        (tmp_path / "none.jsonl", "No such file"),
    ]:
        with pytest.raises(DataError, match=message):
            read_questions(path)


# --- qrels and runs


def test_qrels_in_both_forms(tmp_path):
    expected = {"q1": {"d1": 1, "d2": 0}, "q2": {"d3": -2}}
    trec = ["q1 0 d1 1", "q1\t0\td2\t0", "", "q2   0  d3  -2"]
    assert read_qrels(write(tmp_path / "a.txt", trec)) == expected
    beir = ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td2\t0", "q2\td3\t-2"]
    assert read_qrels(write(tmp_path / "a.tsv.gz", beir)) == expected
    spaces = write(tmp_path / "s.tsv", ["q 1\tGeneva Durben\t1"])
    assert read_qrels(spaces) == {"q 1": {"Geneva Durben": 1}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["q 0 d 1", "q 0 Geneva Durben 1"], ":2: expected query 0 document grade"),
        (["q 0 d 1", "q 0 e x"], ":2: the grade 'x' is not an integer"),
        (["q 0 d 1.5"], ":1: the grade '1.5' is not an integer"),
        (["q 0 d 1", "q 0 d 2"], ":2: query 'q' and document 'd' were judged 1 before"),
        ([""], "the file is empty"),
    ],
)
def test_problems_of_qrels(tmp_path, lines, message):
    path = write(tmp_path / "qrels.txt", lines)
    with pytest.raises(DataError) as caught:
        read_qrels(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 nan t", "the score 'nan' is not a finite number"),
        ("q Q0 d 1 inf t", "the score 'inf'"),
        ("q Q0 d 1 x t", "the score 'x'"),
        ("q Q0 d 1 1.0", "expected query Q0 document rank score tag"),
        ("q Q0 a 1 1.0 t", "document 'a' twice for query 'q'"),
    ],
)
def test_problems_of_runs(tmp_path, line, message):
    path = write(tmp_path / "run.txt", ["q Q0 a 1 2.5 t", line])
    with pytest.raises(DataError) as caught:
        read_run(path)
    assert f"{path}:2: {message}" in str(caught.value)


def test_runs_are_written_best_first_with_tabs(tmp_path):
    path = tmp_path / "run.trec"
    write_run(path, {"q 1": {"low": -1.0, "a b": 0.1, "tied": 0.1}}, "my-run")
    assert path.read_text().splitlines() == [
        "q 1\tQ0\ta b\t1\t0.1\tmy-run",
        "q 1\tQ0\ttied\t2\t0.1\tmy-run",
        "q 1\tQ0\tlow\t3\t-1.0\tmy-run",
    ]


NAMES = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1)
QUERIES = NAMES.filter(lambda name: not name.startswith("\ufeff"))


@settings(deadline=None)
@given(st.dictionaries(QUERIES, st.dictionaries(NAMES, st.integers(-3, 9), min_size=1)))
def test_qrels_round_trip(tmp_path_factory, qrels):
    folder = tmp_path_factory.mktemp("qrels")
    for form, name in (("trec", "a.txt"), ("beir", "a.tsv.gz")):
        write_qrels(folder / name, qrels, form)
        if qrels or form == "beir":
            assert read_qrels(folder / name) == qrels


@settings(deadline=None)
@given(
    st.dictionaries(
        QUERIES,
        st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), min_size=1),
        min_size=1,
    )
)
def test_runs_round_trip(tmp_path_factory, run):
    path = tmp_path_factory.mktemp("run") / "run.gz"
    write_run(path, run, "tag")
    assert read_run(path) == run


@pytest.mark.parametrize("bad", ["", "a\tb", "a\nb"])
def test_ids_that_lines_cannot_hold_are_refused(tmp_path, bad):
    with pytest.raises(DataError, match="is empty or holds a tab"):
        write_run(tmp_path / "run", {"q": {bad: 1.0}}, "t")
    with pytest.raises(DataError, match="is empty or holds a tab"):
        write_qrels(tmp_path / "qrels", {bad: {"d": 1}})
    assert list(tmp_path.iterdir()) == []


def test_a_query_that_begins_with_a_byte_order_mark_is_refused(tmp_path):
    with pytest.raises(DataError, match="byte order mark"):
        write_run(tmp_path / "run", {"q": {"d": 1.0}, "\ufeffq": {"\ufeffd": 1.0}}, "t")
    assert list(tmp_path.iterdir()) == []


# --- writing


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=5,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
DOCUMENTS = st.builds(
    Document, TEXT, TEXT, st.just("") | TEXT, st.dictionaries(st.text("abc", min_size=1), JSON)
)


@settings(deadline=None, max_examples=40)
@given(st.lists(DOCUMENTS, min_size=1, unique_by=lambda d: d.id), st.sampled_from(["", ".gz"]))
def test_documents_round_trip(tmp_path_factory, documents, gz):
    path = tmp_path_factory.mktemp("documents") / f"a.jsonl{gz}"
    write_documents(path, documents)
    assert read(path) == documents
    lines = [to_json(document_record(document)) + "\n" for document in documents]
    assert [document_line(document).decode() for document in documents] == lines


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.builds(
            Example,
            st.builds(Query, TEXT, TEXT, st.dictionaries(st.text("abc"), JSON)),
            st.lists(DOCUMENTS, max_size=2).map(tuple),
            st.lists(DOCUMENTS, max_size=2).map(tuple),
            st.lists(TEXT, max_size=2).map(tuple),
        ),
        min_size=1,
        unique_by=lambda example: example.query.id,
    )
)
def test_questions_round_trip(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    write_questions(path, examples)
    assert read_questions(path) == examples


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_documents(path, [Document("1", "old")])
    before = path.read_bytes()
    for bad in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(DataError):
            write_documents(path, [Document("1", "new"), Document("2", "new", "", bad)])
    with pytest.raises(DataError, match="cannot be written"):
        write_documents(tmp_path / "none" / "a.jsonl", [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_documents(path, [Document("1", "old")])
    assert path.read_bytes() == before


# --- the shared data sets

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RAGKIT_DATA", ROOT / ".." / "shared" / "data"))


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data: set RAGKIT_DATA")
def test_the_shared_sets_are_read_as_they_are():
    folders = [path.parent for path in sorted(DATA.glob("*/corpus.jsonl.gz"))]
    assert folders
    for folder in folders:
        ids = {document.id for document in read(folder)}
        questions = {example.query.id for example in read_questions(folder / "queries.jsonl.gz")}
        for path in sorted((folder / "qrels").iterdir()):
            qrels = read_qrels(path)
            assert questions.issuperset(qrels), path
            assert all(ids.issuperset(grades) for grades in qrels.values()), path
