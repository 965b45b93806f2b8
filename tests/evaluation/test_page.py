import base64
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from ragkit import Answer, Document, Example, Hit, Pipeline, Query
from ragkit.errors import DataError
from ragkit.evaluation import charts
from ragkit.evaluation.browser import CHUNK
from ragkit.evaluation.page import write_page
from ragkit.evaluation.runs import evaluate, evaluate_run
from ragkit.evaluation.sections import in_order

bs4 = pytest.importorskip("bs4", reason="pages are parsed with beautifulsoup4: ragkit[documents]")

ROOT = Path(__file__).parents[2]
CONTEXTS = ["none", "retrieved", "gold", "noise 0 %", "noise 50 %", "noise 100 %"]
EVIL = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "<!-- <script> ]]> {{ 7 * 191 }} {% raw %} &lt; &amp; \u2028 \u2029 \ud800 \x00 \r\n"
    " \"'` $x^2$ 𝔸"
)


def estimate(mean, n=120, spread=0.05):
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": n}


def question(number):
    """Return a line of answers.jsonl: an odd question is right, an even one wrong or abstained."""
    right, abstained = number % 2 == 1, number % 10 == 0
    documents = [f"d{(number + rank) % 40}" for rank in range(12)]
    prompt = "Answer.\n" + "".join(
        f"[{place}] {passage(name)['title']}: {passage(name)['text']}\n"
        for place, name in enumerate(documents[:2], start=1)
    )
    prompt += f"[3] {passage(documents[2])['text'][:20]}\nQuestion {number}?"
    return {
        "id": f"q{number}",
        "question": f"What is number {number}?",
        "golds": [f"gold {number}", f"other {number}"],
        "scores": {"nDCG@10": 1 / (1 + number % 3), "EM": float(right), "F1": (number % 7) / 6}
        | ({"cover": 1.0} if number < 5 else {}),
        "hits": [
            {
                "rank": rank,
                "id": name,
                "score": 20.123456789 / rank,
                "grade": {2: 1, 12: 2, 3: 0}.get(rank),
            }
            | ({"parent": "whole"} if rank == 3 else {})
            for rank, name in enumerate(documents, start=1)
        ],
        "answer": "" if abstained else f"answer {number}" + " [1]" * right,
        "abstained": abstained,
        "citations": documents[:1] if right else [],
        "attributed": False,
        "shown": documents[:3],
        "prompt": prompt,
        "stage": "correct" if right else "abstained wrongly" if abstained else "misread",
        "judge": {"correct": {"reply": f"reply {number}", "verdict": right}},
        "contexts": {
            name: {
                "answer": f"{name} answers {number}",
                "abstained": False,
                "shown": {"none": [], "gold": ["g1"]}.get(name, documents[:2]),
                "scores": {"EM": 0.5, "F1": 0.25},
            }
            for name in CONTEXTS
        },
    }


def passage(name):
    return {"id": name, "title": f"Title {name}", "text": f"Text of {name}, which is long enough."}


def results(questions):
    return {
        "format": 2,
        "ragkit": "0.1.0",
        "retrieval": {"nDCG@10": estimate(0.611)},
        "answers": {"EM": estimate(0.522), "F1": estimate(0.533), "cover": estimate(0.544)},
        "contexts": {
            name: {"EM": estimate(0.301 + place / 100), "F1": estimate(0.401 + place / 100)}
            for place, name in enumerate(CONTEXTS)
        },
        "figures": {"context gain (F1)": estimate(0.123), "order gain (F1)": estimate(-0.017)},
        "stages": {
            "counts": {"misread": 48, "abstained wrongly": 12, "correct": 60},
            "bounds": {"corpus": estimate(0.94), "answer": estimate(0.5)},
            "gains": {"reader": estimate(0.31), "retriever": estimate(0.08)},
            "advice": "Train the reader next: by it 48 of 120 questions were lost.",
        },
        "probes": {"arc-easy": {"accuracy": estimate(0.77)}, "held": {"perplexity": estimate(23)}},
        "costs": {
            "retrieve": {"seconds": 1.25, "per_question": 0.0125, "peak_memory_mb": 900.4},
            "read": {"seconds": 60.5, "per_prompt": 0.504, "prompts": 120, "prompt_tokens": 123456},
        },
        "counts": {"questions": len(questions), "judged": 119, "unknown_documents": 1},
        "listed": {"unknown_documents": ["lost"], "abstained": ["q10"]},
        "settings": {
            "command": {"index": "path/to/kb", "retriever": None, "reranker": None, "keep": 3},
            "questions": {"path": "some/dev.jsonl", "hash": "0"},
            "judge": {
                "model": "judge-9",
                "rubrics": [
                    {"name": "strict", "yes": "Y", "system": "You judge " + 20 * "carefully "}
                ],
            },
        },
        "hashes": {"questions": "0123456789abcdef"},
    }


def write_run(folder, *, change=None, questions=None, passages=None):
    """Write a run folder; `change` is applied to what results.json holds."""
    questions = [question(number) for number in range(120)] if questions is None else questions
    if passages is None:
        passages = [passage(name) for name in ("g1", *(f"d{number}" for number in range(40)))]
    values = results(questions)
    if change:
        change(values)
    folder.mkdir(parents=True)
    for name, rows in (("answers", questions), ("passages", passages)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "results.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def page(run):
    return parsed(write_page(run))


@pytest.fixture
def no_charts(monkeypatch):
    """Leave the charts out, where a test is about something else."""
    for name in ("intervals", "groups", "sweep", "bars"):
        monkeypatch.setattr(charts, name, lambda *arguments: "<svg></svg>")


def parsed(path):
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def index(soup):
    return json.loads(soup.find(id="index").string)


def chunks(soup, kind):
    """Inflate a page's chunks of a kind, in their order."""
    items = []
    for number, script in enumerate(soup.find_all("script", id=re.compile(f"^{kind}-"))):
        assert script["id"] == f"{kind}-{number}"
        items += json.loads(gzip.decompress(base64.b64decode(script.string)))
    return items


def rows_of(soup, title):
    """Return the table below a heading, as lists of texts."""
    block = soup.find("h3", string=title).parent
    return [
        [cell.get_text(" ", strip=True) for cell in row] for row in map(cells, block.find_all("tr"))
    ]


def cells(row):
    return row.find_all(["td", "th"])


# --- what the page says


def test_the_summary(page):
    assert page.title.string == "dev.jsonl · kb – ragkit report"
    assert page.h1.string == "dev.jsonl · kb"
    assert page.find(class_="advice").string.startswith("Train the reader next: by it 48 of 120")
    cards = [card.get_text(" ", strip=True) for card in page.select(".cards li")]
    assert cards == [
        "nDCG@10 0.611 0.561 – 0.661 n = 120",
        "EM 0.522 0.472 – 0.572 n = 120",
        "F1 0.533 0.483 – 0.583 n = 120",
    ]
    header = page.header.get_text(" ", strip=True)
    assert "120 questions, measured with ragkit 0.1.0" in header
    facts = page.select_one("header .facts").get_text(" ", strip=True)
    assert facts == (
        "questions some/dev.jsonl index path/to/kb retriever the index’s own reranker none keep 3"
    )


def test_tables_hold_the_values_in_a_sensible_order(page):
    assert rows_of(page, "Answers") == [
        ["measure", "mean", "95 % interval", "n"],
        ["EM", "0.522", "0.472 – 0.572", "120"],
        ["F1", "0.533", "0.483 – 0.583", "120"],
        ["cover", "0.544", "0.494 – 0.594", "120"],
    ]
    assert rows_of(page, "Questions by stage")[1:] == [
        ["misread", "48", "40.0%"],
        ["abstained wrongly", "12", "10.0%"],
        ["correct", "60", "50.0%"],
    ]
    assert [row[:2] for row in rows_of(page, "Oracle bounds")[1:]] == [
        ["corpus", "0.940"],
        ["answer", "0.500"],
    ]
    assert [row[:2] for row in rows_of(page, "Gains within reach")[1:]] == [
        ["reader", "0.310"],
        ["retriever", "0.080"],
    ]
    assert rows_of(page, "By context") == [
        ["context", "EM", "F1", "n"],
        ["none", "0.301 0.251 – 0.351", "0.401 0.351 – 0.451", "120"],
        ["retrieved", "0.311 0.261 – 0.361", "0.411 0.361 – 0.461", "120"],
        ["gold", "0.321 0.271 – 0.371", "0.421 0.371 – 0.471", "120"],
    ]
    assert [row[:2] for row in rows_of(page, "Noise sweep")[1:]] == [
        ["0 %", "0.331 0.281 – 0.381"],
        ["50 %", "0.341 0.291 – 0.391"],
        ["100 %", "0.351 0.301 – 0.401"],
    ]
    assert rows_of(page, "Figures")[2] == ["order gain (F1)", "−0.017", "−0.067 – 0.033", "120"]
    assert rows_of(page, "Probes")[2][:2] == ["held, perplexity", "23.000"]
    assert rows_of(page, "By stage") == [
        [
            "stage",
            "seconds",
            "ms a question",
            "ms a prompt",
            "peak memory, MB",
            "prompts",
            "tokens read",
        ],
        ["retrieve", "1.2", "12.5", "", "900", "", ""],
        ["read", "60.5", "", "504.0", "", "120", "123,456"],
    ]
    assert rows_of(page, "Questions and documents")[1:] == [
        ["questions", "120", ""],
        ["judged", "119", ""],
        ["unknown documents", "1", "lost"],
    ]


@pytest.mark.usefixtures("no_charts")
def test_questions_in_no_stage_are_told_of_where_stages_are_shown(tmp_path, page):
    def two(values):
        values["counts"]["not_staged"] = 2

    soup = parsed(write_page(write_run(tmp_path / "run", change=two)))
    notes = [each.find("h3", string="Questions by stage").parent.p.string for each in (soup, page)]
    assert notes[0] == (
        "Each question counts at the first stage that lost it, in the order of the stages. "
        "2 judged questions are in no stage: without gold answers, right and wrong cannot be told "
        "apart."
    )
    assert notes[1] == notes[0].split(" 2 judged")[0]


@pytest.mark.usefixtures("no_charts")
def test_listed_ids_of_questions_lead_to_them(tmp_path):
    def abstained(values):
        values["counts"]["abstained"] = 12

    soup = parsed(write_page(write_run(tmp_path / "run", change=abstained)))
    assert soup.find("a", string="q10")["href"] == "#question/10"
    assert soup.find("a", string="lost") is None


def test_settings_and_the_judges_prompts(page):
    text = page.find(id="settings").pre.string
    assert json.loads(text) == results([])["settings"]
    judge = page.find(id="judge")
    assert judge.find("dd").string == "judge-9"
    assert judge.pre.string.startswith("You judge carefully")
    assert [term.string for term in judge.find_all(["dt", "summary"])] == [
        "model", "rubrics · strict · name", "rubrics · strict · yes", "rubrics · strict · system",
    ]  # fmt: skip


def test_every_chart_has_a_caption_and_ids_of_its_own(page):
    svgs = page.find_all("svg")
    # Retrieval, answers, stages, bounds, gains, contexts, figures, sweep, probes.
    assert len(svgs) == 9
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(set(ids)) == len(ids)
    for element in page.select("svg use"):
        assert element["href"].removeprefix("#") in ids


def without(*path):
    def change(values):
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = {}

    return change


@pytest.mark.parametrize(
    ("path", "anchor", "title"),
    [
        (["retrieval"], None, "Retrieval"),
        (["answers"], None, "Answers"),
        (["stages"], "stages", "Where questions were lost"),
        (["stages", "gains"], None, "Gains within reach"),
        (["contexts"], None, "By context"),
        (["contexts"], None, "Noise sweep"),
        (["figures"], None, "Figures"),
        (["probes"], "probes", "General ability"),
        (["costs"], "costs", "Costs"),
        (["settings"], "judge", "The judge"),
    ],
)
@pytest.mark.usefixtures("no_charts")
def test_what_has_no_data_is_not_there(tmp_path, page, path, anchor, title):
    assert page.find(["h2", "h3"], string=title)
    soup = parsed(write_page(write_run(tmp_path / "run", change=without(*path))))
    assert not soup.find(["h2", "h3"], string=title)
    if anchor:
        assert page.find(id=anchor) and page.find("a", href=f"#{anchor}")
        assert not soup.find(id=anchor) and not soup.find("a", href=f"#{anchor}")


@pytest.mark.usefixtures("no_charts")
def test_a_run_without_reader_has_no_fields_of_answers(tmp_path):
    names = ("id", "question", "golds", "hits")
    bare = [
        {name: question(n)[name] for name in names} | {"scores": {"nDCG@10": 1.0}} for n in range(3)
    ]

    def change(values):
        for name in ("answers", "contexts", "figures", "stages"):
            values[name] = {}

    soup = parsed(write_page(write_run(tmp_path / "run", change=change, questions=bare)))
    assert [option["value"] for option in soup.select("#measure option")] == ["nDCG@10"]
    assert soup.find(id="order")
    assert not soup.find(id="stage") and not soup.find(id="abstained")
    assert not soup.find(class_="advice") and not soup.find(id="contexts")
    assert index(soup)["rows"][0] == [
        "q0", "What is number 0?", ["gold 0", "other 0"], [1], None, None, None,
    ]  # fmt: skip
    assert chunks(soup, "details")[0]["prompt"] is None


@pytest.mark.usefixtures("no_charts")
def test_settings_of_any_form_are_shown(tmp_path):
    odd = {"command": "by hand", "questions": ["a"], "run": {"path": 5}, "judge": [1, None, ["x"]]}
    for number, settings in enumerate((odd, {}, {"command": {"index": ["a"]}})):
        run = write_run(tmp_path / str(number), change=lambda v, s=settings: v.update(settings=s))
        assert json.loads(parsed(write_page(run)).find(id="settings").pre.string) == settings


# --- the questions


def test_the_index_holds_each_question(page):
    found = index(page)
    assert found["chunk"] == CHUNK == 100
    assert found["measures"] == ["nDCG@10", "EM", "F1", "cover"]
    for number, row in enumerate(found["rows"]):
        line = question(number)
        scores = [round(line["scores"][name], 4) for name in ("nDCG@10", "EM", "F1")]
        scores.append(1 if number < 5 else None)
        assert row == [
            line["id"], line["question"], line["golds"], scores, line["answer"],
            line["abstained"], line["stage"],
        ]  # fmt: skip
    assert len(found["rows"]) == 120


def test_the_details_hold_the_rest(page):
    passages = chunks(page, "passages")
    details = chunks(page, "details")
    assert len(passages) == 41 and len(details) == 120
    for number, detail in enumerate(details):
        line = question(number)
        text = {name: passages[place][1] for name, place in detail["places"].items()}
        for name in ("shown", "citations", "judge"):
            assert detail[name] == line[name]
        assert detail["found"] == 12
        # All hits up to rank 10, and the relevant one at rank 12.
        assert [hit[0] for hit in detail["hits"]] == [*range(1, 11), 12]
        for rank, name, score, grade, parent in detail["hits"]:
            hit = line["hits"][rank - 1]
            assert [name, grade, parent] == [hit["id"], hit["grade"], hit.get("parent")]
            assert score == pytest.approx(hit["score"], rel=1e-5)
            assert text[name] == passage(name)["text"]
        prompt = detail["prompt"]
        assert "".join(text[p] if n % 2 else p for n, p in enumerate(prompt)) == line["prompt"]
        # What is whole in the prompt is not there twice; the third passage is cut.
        assert prompt[1::2] == line["shown"][:2]
        assert [name for name, _ in detail["contexts"]] == CONTEXTS
        assert dict(detail["contexts"])["gold"]["shown"] == ["g1"] and text["g1"]


def test_a_passage_stands_in_the_page_once(page):
    passages = chunks(page, "passages")
    texts = [text for _, text in passages]
    assert sorted(texts) == sorted(set(texts))
    assert not [
        part
        for detail in chunks(page, "details")
        for part in detail["prompt"][::2]
        for text in texts
        if text in part
    ]


@pytest.mark.usefixtures("no_charts")
def test_hits_without_text(tmp_path):
    soup = parsed(write_page(write_run(tmp_path / "run", passages=[])))
    detail = chunks(soup, "details")[3]
    assert detail["places"] == {} and len(detail["hits"]) == 11
    assert detail["prompt"] == [question(3)["prompt"]]


# --- bytes


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    code = "import sys; from pathlib import Path; from ragkit.evaluation.page import write_page; "
    code += "write_page(Path(sys.argv[1]), Path(sys.argv[2])); print(*sys.modules)"
    other = tmp_path / "other.html"
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", code, copy, other],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    assert write_page(run).read_bytes() == other.read_bytes()
    # Its global state would be shared with the user's own plots.
    assert "matplotlib.figure" in done.stdout.decode().split()
    assert "matplotlib.pyplot" not in done.stdout.decode().split()


def test_nothing_heavy_is_imported_before_a_page_is_written():
    code = "import sys, ragkit.evaluation.page as page; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    tops = {name.split(".")[0] for name in loaded.stdout.decode().split()}
    assert not tops & {"matplotlib", "jinja2", "torch"}


def test_the_wheel_carries_the_files_of_the_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["package-data"]["ragkit.evaluation"]
    folder = ROOT / "ragkit/evaluation"
    files = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(listed) == files


def test_the_policy_forbids_all_but_the_pages_own_script(page):
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    script = page.find("script", id=False).string
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    data = {script.get("type") for script in page.find_all("script", id=True)}
    assert data == {"application/json", "text/plain"}


def test_nothing_in_the_page_names_another_place(page):
    assert not page.find_all(src=True)
    for element in page.find_all(href=True):
        assert element["href"].startswith("#") or element["href"] == "data:,"
    style = "".join(element.string for element in page.find_all("style"))
    assert "@import" not in style and "url(" not in style and "@font-face" not in style
    assert "://" not in style and "://" not in page.find("script", id=False).string
    for svg in page.find_all("svg"):
        assert "://" not in str(svg)


# --- data is text


def hostile(tmp_path):
    rows = []
    for number in range(3):
        row = question(number)
        row |= {"id": EVIL + str(number), "question": EVIL, "golds": [EVIL], "answer": EVIL}
        row |= {"prompt": EVIL * 2, "shown": [EVIL], "citations": [EVIL], "stage": EVIL}
        row["judge"] = {EVIL: {"reply": EVIL, "verdict": None}}
        row["scores"] = {EVIL: 1.0}
        row["hits"][0] |= {"id": EVIL, "parent": EVIL}
        row["contexts"] = {
            EVIL: {"answer": EVIL, "abstained": False, "shown": [EVIL], "scores": {}}
        }
        rows.append(row)

    def change(values):
        values["answers"] = {EVIL: estimate(0.5)}
        values["contexts"] = {EVIL: {EVIL: estimate(0.5)}, "noise 50 %": {EVIL: estimate(0.5)}}
        values["figures"] = {EVIL: estimate(0.1)}
        values["probes"] = {EVIL: {EVIL: estimate(0.4)}}
        values["stages"] |= {"advice": EVIL, "counts": {EVIL: 3}, "gains": {EVIL: estimate(0.1)}}
        values["costs"] = {EVIL: {"seconds": 1.0}}
        values["listed"] = {"unknown_documents": [EVIL, EVIL + "0"]}
        values["settings"] = {
            "command": {"index": EVIL, "generator": EVIL},
            "judge": {EVIL: EVIL},
            "questions": {"path": EVIL},
        }

    passages = [{"id": EVIL, "title": EVIL, "text": EVIL}]
    return write_run(tmp_path / "run", change=change, questions=rows, passages=passages)


def visible(text):
    """Return a text as HTML shows it: no lone surrogate, no NUL, one kind of line end."""
    return re.sub("[\ud800-\udfff\x00]", "\ufffd", text).replace("\r\n", "\n")


def test_hostile_data_stays_text(tmp_path, page):
    soup = parsed(write_page(hostile(tmp_path)))
    assert len(soup.find_all("script", id=False)) == 1
    assert not soup.find_all("img") and not soup.find_all(onerror=True)
    assert soup.find_all("script")[1].string == page.find_all("script")[1].string
    assert "1337" not in soup.get_text()
    assert visible(soup.find(class_="advice").string.replace("\x00", "\ufffd")) == visible(EVIL)
    rows = index(soup)["rows"]
    assert [row[0] for row in rows] == [EVIL + str(number) for number in range(3)]
    assert rows[0][1] == rows[0][4] == rows[0][6] == EVIL and rows[0][2] == [EVIL]
    assert chunks(soup, "passages") == [[EVIL, EVIL]]
    detail = chunks(soup, "details")[0]
    assert detail["prompt"] == ["", EVIL, EVIL]
    assert detail["places"] == {EVIL: 0}


def test_order_of_names():
    names = ["hit@100", "F1", "recall@5", "judge correct", "hit@5", "zeta", "nDCG@10", "recall@10"]
    assert in_order(names, ("nDCG", "recall", "hit", "F1", "judge")) == [
        "nDCG@10", "recall@5", "recall@10", "hit@5", "hit@100", "F1", "judge correct", "zeta",
    ]  # fmt: skip
    known = ("gold", "gold+distractors", "wrong")
    assert in_order(["noise 5 %", "wrong", "gold+distractors", "noise 25 %", "gold"], known) == [
        "gold", "gold+distractors", "wrong", "noise 5 %", "noise 25 %",
    ]  # fmt: skip


# --- bad input


def test_what_is_no_run_folder_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"is no run folder: it holds no results.json\. Name"):
            write_page(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 3, None, "2"])
@pytest.mark.usefixtures("no_charts")
def test_another_format_is_refused(tmp_path, number):
    run = write_run(tmp_path / "run", change=lambda values: values.update(format=number))
    with pytest.raises(
        DataError, match=rf"has the format {number!r}; this ragkit reads 2. Run the"
    ):
        write_page(run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"id": "x"}', "KeyError: 'scores'"),
        (json.dumps(question(1) | {"scores": {"EM": float("nan")}}), "NaN is not a JSON value"),
        (json.dumps(question(1) | {"scores": {"EM": "high"}}), "TypeError"),
        (json.dumps(question(1) | {"hits": [{"rank": 1}]}), "KeyError"),
    ],
)
@pytest.mark.usefixtures("no_charts")
def test_a_damaged_line_is_named_and_the_page_that_was_there_stays(tmp_path, line, message):
    run = write_run(tmp_path / "run")
    before = write_page(run).read_bytes()
    with (run / "answers.jsonl").open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(DataError, match=rf"answers.jsonl:121: .*{message}"):
        write_page(run)
    assert (run / "report.html").read_bytes() == before
    assert len(list(run.iterdir())) == 4


@pytest.mark.usefixtures("no_charts")
def test_infinite_scores_are_refused(tmp_path):
    run = write_run(tmp_path / "run", questions=[])
    (run / "answers.jsonl").write_text(json.dumps(question(1)).replace("20.123456789", "1e999"))
    with pytest.raises(DataError, match="a score of the run cannot be written"):
        write_page(run)


@pytest.mark.parametrize("name", ["answers.jsonl", "passages.jsonl"])
@pytest.mark.usefixtures("no_charts")
def test_a_missing_file_is_named(tmp_path, name):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(No such file.*Run the"):
        write_page(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("contexts"),
        lambda values: values["answers"].update(EM={"mean": 0.5}),
        lambda values: values["answers"].update(EM=estimate(0.5) | {"high": float("nan")}),
        lambda values: values.update(counts=[]),
        lambda values: values["counts"].update(judged="many"),
    ],
)
def test_damaged_results_are_named(tmp_path, change):
    run = write_run(tmp_path / "run", change=change)
    with pytest.raises(DataError, match=r"results.json is damaged \(.*Run the evaluation again"):
        write_page(run)
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("no_charts")
def test_an_output_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "folder", tmp_path / "nowhere" / "report.html"):
        with pytest.raises(DataError, match="cannot be written"):
            write_page(run, output)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    chosen = tmp_path / "chosen.html"
    assert write_page(run, chosen) == chosen and chosen.stat().st_mode & 0o777 == 0o644


# --- what evaluate writes


class Finder:
    def retrieve(self, queries, k):
        found = [Document("p", "Paris is in France.", "Paris"), Document("l", "Lyon has bridges.")]
        return [
            [Hit(document, 1.0 / rank) for rank, document in enumerate(found, 1)] for _ in queries
        ]


class Teller:
    def read(self, queries, hits):
        return [
            Answer(
                query,
                "Paris [1]",
                tuple(found),
                "The prompt: " + " ".join(h.document.text for h in found),
                (0,) if found else (),
            )
            for query, found in zip(queries, hits, strict=True)
        ]


EXAMPLES = [
    Example(Query("q1", "Which city?"), (), (), ("Paris",)),
    Example(Query("q2", "Bridges?"), (), (), ("Lyon",)),
]
QRELS = {"q1": {"p": 1}, "q2": {"l": 1}}


@pytest.mark.usefixtures("no_charts")
def test_the_page_of_what_evaluate_wrote(tmp_path):
    pipeline = Pipeline(Finder(), None, Teller())
    contexts = ("none", "retrieved", "wrong", "shuffled")
    found = evaluate(pipeline, EXAMPLES, qrels=QRELS, contexts=contexts, output=tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    written = page.read_bytes()
    assert write_page(tmp_path / "run") == page and page.read_bytes() == written
    soup = parsed(page)
    assert [row[0] for row in rows_of(soup, "By context")[1:]] == list(contexts)
    em = found.answers["EM"]
    assert ["EM", f"{em.mean:.3f}", f"{em.low:.3f} – {em.high:.3f}", "2"] in rows_of(
        soup, "Answers"
    )
    assert soup.find(class_="advice").string == found.stages.advice
    detail = chunks(soup, "details")[0]
    assert detail["prompt"][1::2] == ["p", "l"] and detail["hits"][0][3] == 1


@pytest.mark.usefixtures("no_charts")
def test_the_page_of_a_run_of_another_system(tmp_path):
    evaluate_run({"q1": {"p": 2.0, "l": 1.0}}, QRELS, output=tmp_path / "run")
    soup = parsed(tmp_path / "run" / "report.html")
    assert rows_of(soup, "Retrieval")[1][0] == "nDCG@10"
    assert index(soup)["rows"][0][:3] == ["q1", "", []]
    assert chunks(soup, "details")[0]["places"] == {}


# --- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")


class Chromium:
    """A headless Chromium, and what it logs."""

    def __init__(self, folder):
        webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
        if not (CHROMIUM and DRIVER):
            pytest.skip("no Chromium: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync",
            "hide-scrollbars", f"user-data-dir={folder}",
        ):  # fmt: skip
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.run = self.driver.execute_script

    def open(self, path, width=1280, *, dark=False, hash=""):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + hash)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        elements = "[...document.querySelectorAll(arguments[0])]"
        # As JSON, which can hold lone surrogates.
        script = f"return JSON.stringify({elements}.map((x) => x.textContent))"
        return json.loads(self.run(script, selector))

    def click(self, selector):
        self.all(selector)[0].click()

    def choose(self, name, value):
        self.click(f"#{name} option[value='{value}']")

    def type(self, text):
        box = self.all("#search")[0]
        box.clear()
        box.send_keys(text)

    def wait(self, selector):
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: self.all(selector))

    def ids(self):
        return self.texts("#list .id")

    def requests(self):
        """Return the addresses asked for since the last call."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def shoot(self, path):
        """Photograph the whole page."""
        size = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], 12000), "scale": 1}
        options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path.write_bytes(base64.b64decode(data))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def written(run):
    return write_page(run)


def expected(words=(), test=lambda row: True):
    rows = [question(number) for number in range(120)]
    return [
        row["id"]
        for row in rows
        if test(row)
        and all(
            word in "\n".join([row["id"], row["question"], row["answer"], *row["golds"]]).lower()
            for word in words
        )
    ]


def test_the_list_is_paged_searched_filtered_and_sorted(chromium, written):
    chromium.open(written)
    everything = expected()
    assert chromium.ids() == everything[:50]
    assert chromium.texts("#found") == ["1–50 of 120"]
    assert chromium.texts("#list th") == ["Question", "Answer", "Gold", "Stage", "F1"]
    assert not chromium.all("#previous")[0].is_enabled()
    chromium.click("#next")
    assert chromium.ids() == everything[50:100]
    chromium.click("#last")
    assert chromium.ids() == everything[100:]
    assert not chromium.all("#next")[0].is_enabled()
    chromium.click("#first")
    assert chromium.ids() == everything[:50]

    for words in (["q11"], ["gold", "17"], ["other", "ANSWER", "3"], ["number 9?"], ["nothing"]):
        chromium.type(" ".join(words))
        lowered = [word for text in words for word in text.lower().split()]
        assert chromium.ids() == expected(lowered)
    assert chromium.texts("#found") == ["No question fits the search and the filters."]
    chromium.type(" ")

    chromium.choose("stage", "misread")
    misread = expected(test=lambda row: row["stage"] == "misread")
    assert chromium.ids() == misread and len(misread) == 48
    assert chromium.texts("#found") == ["1–48 of 48 (of 120)"]
    chromium.choose("stage", "")
    chromium.choose("abstained", "yes")
    assert chromium.ids() == expected(test=lambda row: row["abstained"])
    chromium.choose("abstained", "")
    chromium.choose("measure", "EM")
    chromium.choose("score", "right")
    assert chromium.ids() == expected(test=lambda row: row["scores"]["EM"] == 1)[:50]
    chromium.choose("measure", "F1")
    chromium.choose("score", "partly")
    assert chromium.ids() == expected(test=lambda row: 0 < row["scores"]["F1"] < 1)[:50]
    chromium.choose("score", "wrong")
    assert chromium.ids() == expected(test=lambda row: row["scores"]["F1"] == 0)
    chromium.choose("measure", "cover")
    assert chromium.ids() == []
    chromium.choose("score", "none")
    assert chromium.ids() == everything[5:55]
    chromium.choose("score", "")

    chromium.choose("measure", "F1")
    for order, sign in (("best", -1), ("worst", 1)):
        chromium.choose("order", order)
        ranked = sorted(range(120), key=lambda number: sign * question(number)["scores"]["F1"])
        assert chromium.ids() == [f"q{number}" for number in ranked[:50]]
    assert chromium.complaints() == []


def test_a_stage_in_the_table_filters_the_list(chromium, written):
    chromium.open(written)
    chromium.click("[data-stage='abstained wrongly']")
    assert chromium.ids() == expected(test=lambda row: row["abstained"])
    assert (
        chromium.run("return document.querySelector('#questions').getBoundingClientRect().top") < 5
    )


def test_a_question_opens_and_closes(chromium, written):
    chromium.open(written)
    chromium.requests()
    chromium.choose("stage", "correct")
    chromium.click("#next")
    place = chromium.ids().index("q113")
    chromium.all("#list .link")[place].click()
    chromium.wait("#prompt")  # until then the page may still stand where it was clicked
    scroll = chromium.run("return scrollY")
    line = question(113)
    assert scroll == 0 and not chromium.all("#report")[0].is_displayed()
    assert chromium.texts("#question h1") == [line["question"]]
    names = chromium.texts(".said > dt")
    assert names == ["Answer", "Gold answers", "Stage", "Id"]
    assert chromium.texts(".said > dd")[0] == "answer 113 [1]"
    assert chromium.texts(".said li") == line["golds"]
    assert chromium.texts(".scores div") == ["nDCG@100.333", "EM1.000", "F10.167"]
    assert chromium.texts("#question > div > .passages .rank") == [*map(str, range(1, 11)), "12"]
    text = [passage(hit["id"])["text"] for hit in line["hits"]]
    assert chromium.texts("#question > div > .passages .text") == [*text[:10], text[11]]
    marks = chromium.run(
        "return [...document.querySelectorAll('#question > div > .passages li')].map("
        "(item) => [...item.querySelectorAll('.mark')].map((mark) => mark.textContent))"
    )
    assert marks[:4] == [["shown as [1]", "cited"], ["gold", "shown as [2]"], ["shown as [3]"], []]
    assert marks[10] == ["gold, grade 2"]
    facts = chromium.texts("#question > div > .passages .facts-line")
    assert facts[2] == "id d35 · score 6.70782 · part of whole · judged not relevant"
    assert "1 more hits are not listed." in chromium.texts("#question p.muted")
    rows = chromium.texts(".contexts tbody tr")
    assert rows[0] == "nonenone answers 1130.5000.250nothing" and len(rows) == len(CONTEXTS)
    assert chromium.texts("#question details .title") == ["Title g1"]
    assert chromium.texts("#question details .mark") == ["gold"]
    assert chromium.texts(".judged div") == ["correct: yesreply 113"]
    prompt = chromium.all("#prompt pre")[0]
    assert not prompt.is_displayed()
    chromium.click("#prompt summary")
    assert prompt.is_displayed() and chromium.texts("#prompt pre") == [line["prompt"]]

    assert chromium.texts(".bar .muted") == ["57 of 60"]
    chromium.click(".bar button:nth-child(3)")
    chromium.wait("#prompt")
    assert chromium.texts("#question h1") == ["What is number 115?"]
    chromium.click("#back")
    assert chromium.all("#report")[0].is_displayed() and not chromium.all("#question h1")
    # The list is as it was, and the question that was read has the focus.
    assert chromium.texts("#found") == ["51–60 of 60 (of 120)"]
    assert chromium.driver.switch_to.active_element.get_attribute("id") == "row-115"
    top = chromium.run("return document.activeElement.getBoundingClientRect().top")
    assert 0 <= top <= 900
    assert chromium.complaints() == []
    assert chromium.requests() <= {written.as_uri()}


def test_the_page_works_by_keyboard_and_by_address(chromium, written):
    from selenium.webdriver.common.keys import Keys

    chromium.open(written)
    chromium.all("#row-3")[0].send_keys(Keys.ENTER)
    chromium.wait("#prompt")
    assert chromium.texts("#question h1") == ["What is number 3?"]
    assert chromium.driver.switch_to.active_element.tag_name == "h1"
    chromium.driver.switch_to.active_element.send_keys(Keys.TAB)
    outline = chromium.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    chromium.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert chromium.driver.switch_to.active_element.get_attribute("id") == "row-3"
    chromium.driver.forward()
    chromium.wait("#prompt")
    chromium.driver.back()
    assert chromium.all("#list .link")[0].is_displayed()

    chromium.open(written, hash="#question/107")
    chromium.wait("#prompt")
    assert chromium.texts("#question h1") == ["What is number 107?"]
    chromium.click("#back")
    assert (
        chromium.run("return document.querySelector('#questions').getBoundingClientRect().top") < 5
    )
    for wrong in ("#question/120", "#question/x"):
        chromium.open(written, hash=wrong)
        assert chromium.all("#report")[0].is_displayed()
    for control in ("input", "select"):
        for element in chromium.all(control):
            assert element.accessible_name in {
                "Search", "Stage", "Measure", "Score", "Abstained", "Order"
            }  # fmt: skip
    assert chromium.complaints() == []


CONTRAST = """
const luminance = (colour) => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const x = Number(part) / 255;
    return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const paper = getComputedStyle(document.body).backgroundColor;
return arguments[0].flatMap((selector) => [...document.querySelectorAll(selector)].map((x) => {
  const style = getComputedStyle(x);
  const [a, b] = [luminance(x.closest("svg") ? style.fill : style.color), luminance(paper)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}));
"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_and_can_be_read(chromium, written, tmp_path, width, dark):
    fits = (
        "return document.documentElement.scrollWidth <= innerWidth && innerWidth === arguments[0]"
    )
    chromium.open(written, width, dark=dark)
    paper = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert chromium.run(fits, width)
    words = ["p", "h1", "td", "th", "dt", "a", ".link", ".muted", "small", "summary", "svg text"]
    assert min(chromium.run(CONTRAST, words)) >= 4.5
    chromium.shoot(tmp_path / "report.png")
    chromium.all("#row-10")[0].click()
    chromium.wait("#prompt")
    chromium.run("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    assert chromium.run(fits, width)
    assert min(chromium.run(CONTRAST, [".mark", ".facts-line", ".rank", "td", "pre", "dd"])) >= 4.5
    chromium.shoot(tmp_path / "question.png")
    for name in ("report", "question"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert int.from_bytes(picture[16:20], "big") == width and len(picture) > 20_000


def test_hostile_data_runs_nothing(chromium, tmp_path):
    chromium.open(write_page(hostile(tmp_path)))
    assert chromium.texts("#list .link")[0] == EVIL
    chromium.click("#list .link")
    chromium.wait("#prompt")
    assert chromium.texts("#question h1") == [EVIL]
    assert chromium.texts("#question > div > .passages .text")[0] == EVIL
    assert chromium.texts("#prompt pre") == [EVIL * 2]
    assert chromium.run("return window.hacked === undefined && !document.querySelector('img')")
    chromium.click("#back")
    assert chromium.complaints() == []


def test_the_policy_holds(chromium, written):
    chromium.open(written)
    chromium.requests()
    violations = chromium.driver.execute_async_script("""
        const [done] = arguments, seen = [];
        addEventListener("securitypolicyviolation", (e) => seen.push(e.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "https://ragkit.invalid/x.png";
        document.body.append(image);
        document.body.setAttribute("onclick", "window.hacked = 1");
        document.body.click();
        const end = () => setTimeout(() => done(seen), 50);
        fetch("https://ragkit.invalid/").then(end, end);
    """)
    kinds = {"script-src-elem", "script-src-attr", "img-src", "connect-src"}
    assert kinds <= set(violations)
    assert chromium.run("return window.hacked === undefined")
    chromium.complaints()


@pytest.mark.slow
def test_ten_thousand_questions_open_at_once(chromium, tmp_path):
    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (1 + place) for place in range(len(words))]

    def text(length):
        return " ".join(chance.choices(words, weights, k=length // 3))[:length]

    passages = [{"id": f"p{n}", "title": text(20), "text": text(700)} for n in range(50_000)]
    questions = []
    for number in range(10_000):
        row, mine = question(number), passages[5 * number : 5 * number + 5]
        row["hits"] = [
            {"rank": rank, "id": one["id"], "score": 1 / rank, "grade": None}
            for rank, one in enumerate(mine, start=1)
        ]
        shown = "".join(f"[{n}] {one['title']}: {one['text']}\n" for n, one in enumerate(mine, 1))
        row |= {"shown": [one["id"] for one in mine], "prompt": (shown + text(600))[:4000]}
        row |= {"contexts": {}, "question": text(60), "citations": []}
        questions.append(row)
    path = write_page(write_run(tmp_path / "run", questions=questions, passages=passages))
    assert path.stat().st_size < 40e6
    source = (
        "new MutationObserver((_, observer) => {"
        " if (document.querySelector('#list tbody tr')) {"
        " window.first = performance.now(); observer.disconnect(); }"
        "}).observe(document, { childList: true, subtree: true });"
    )
    added = chromium.driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": source}
    )
    chromium.open(path)
    chromium.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    print(
        f"{path.stat().st_size / 1e6:.1f} MB, first row after {chromium.run('return first'):.0f} ms"
    )
    assert chromium.run("return first") < 2000
    chromium.click("#last")
    chromium.all("#list .link")[-1].click()
    chromium.wait("#prompt")
    assert chromium.texts("#prompt pre") == [questions[-1]["prompt"]]
