"""Write README's tables from the results, so that README claims only what was measured.

    python benchmarks/table.py --write     # or --check, which fails where README differs

README marks each place with `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`; NAME is
retrieval, reading, contexts, tokens, ways, adaptation, generator, forgetting or speed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from measure import RESULTS, ROOT

from ragkit.evaluation.contexts import CONTEXTS

README = ROOT / "README.md"
_FOLDERS = {"forgetting": "generator"}  # of the results, where it is not the table's name
_PLACE = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="put the tables into README")
    action.add_argument("--check", action="store_true", help="fail where README differs")
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = _PLACE.sub(lambda place: f"{place[1]}{render(place[2])}{place[3]}", old)
    if arguments.write:
        README.write_text(new, encoding="utf-8", newline="\n")
    elif old != new:
        sys.exit("README's tables are not those of benchmarks/results: run table.py --write")


def render(name: str) -> str:
    """Return one table in Markdown, with a line on where it was measured."""
    if name not in TABLES:
        sys.exit(f"README asks for the table {name!r}; known are {', '.join(TABLES)}")
    parts = sorted((RESULTS / _FOLDERS.get(name, name)).glob("*.json"))
    if not parts:
        sys.exit(f"README asks for the table {name!r}: there are no results of it")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
    rows = [row for result in results for row in result["rows"]]
    return f"\n{TABLES[name](rows)}\n\n{_sources(results)}\n\n"


def _sources(results: Sequence[dict[str, Any]]) -> str:
    """Say when, at which commits, on what and with what results were measured."""
    commits: dict[str, list[str]] = {}
    for each in results:
        machine = each["machine"]
        versions = ", ".join(f"{package} {number}" for package, number in each["versions"].items())
        place = f"on {machine['cores']} cores of {machine['processor']}; {versions}"
        known = commits.setdefault(place, [])
        if (measured := f"{each['date']} at {each['commit']}") not in known:
            known.append(measured)
    return " ".join(f"Measured {', '.join(known)}, {place}." for place, known in commits.items())


def retrieval(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out quality_retrieval.py's rows."""
    measures = ("nDCG@10", "recall@10")
    return _table(
        ("set", "system", *measures, "n"),
        [
            (f"{r['set']} {r['split']}", r["system"], *(_mean(r[m]) for m in measures), str(r["n"]))
            for r in rows
        ],
    )


def reading(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out quality_reading.py's rows."""
    measures = ("EM", "F1", "cover")
    return _table(
        ("passages given", *measures),
        [(row["context"], *(_mean(row[measure]) for measure in measures)) for row in rows],
    )


def contexts(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the context-use tables of quality_reading.py, a set after the other."""
    lines = [
        (row["settings"]["set"], context, *(_mean(scores[m]) for m in ("EM", "F1", "cover")),
         str(scores["F1"]["n"]))
        for row in rows
        for context, scores in sorted(row["contexts"].items(), key=_context_place)
    ]  # fmt: skip
    return _table(("set", "passages given", "EM", "F1", "cover", "n"), lines)


def _context_place(item: tuple[str, Any]) -> tuple[int, float]:
    """Order contexts as they are asked for, and the noise sweep by its shares."""
    if item[0] in CONTEXTS:
        return CONTEXTS.index(item[0]), 0.0
    return len(CONTEXTS), float(re.sub(r"[^\d.]", "", item[0]))


def tokens(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out quality_tokens.py's conditions, in the order of the passages that are shown."""
    measures = ("EM", "F1", "cover")
    lines = []
    for row in rows:
        found = row.get("sweep", {}).get("conditions", {}) | row["conditions"]
        for name, of in sorted(found.items(), key=_condition_place):
            passages, _, answers = re.sub(r"\b1 (\w+)s\b", r"1 \1", name).partition(": ")
            cells = (_mean(of[measure]) for measure in measures)
            lines.append((passages, answers, *cells, str(of["EM"]["n"])))
    return _table(("passages", "answered with", *measures, "n"), lines)


WAYS = {
    "middle": "passages, tokens, question",
    "last": "passages, question, tokens",
    "front": "tokens, passages, question",
    "fixed": "passages, tokens, question; all tokens in each step",
    "prompt-tuning": "tokens before all (peft's prompt tuning)",
    "lora": "no tokens: LoRA of rank 8",
}


def ways(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the ways to learn of quality_tokens.py, and how far they are from the first one."""
    measures = ("EM", "F1", "cover")
    lines = []
    compared = next(row for row in rows if row["way"] == "all")
    for way, of in compared["conditions"].items():
        away = [v for name, v in compared["differences"].items() if name.endswith(f" - {way}")]
        cells = [_mean(of[m]) for m in measures]
        lines.append((WAYS[way], *cells, _mean(away[0]["EM"]) if away else "", str(of["EM"]["n"])))
    lines.sort(key=lambda line: line[-2] != "")  # the one that the others are compared with
    return _table(("what is learnt", *measures, "EM of the first row, less this", "n"), lines)


def _condition_place(item: tuple[str, Any]) -> tuple[str, int]:
    """Order conditions by their passages, and within them by how many tokens are used."""
    passages, _, answers = item[0].partition(": ")
    count = re.match(r"\d+", answers)
    return passages, int(count[0]) if count else -len(answers)


LEARNT = {
    "bm25": "BM25",
    "base": "base",
    "contrastive": "both sides",
    "query": "query side",
    "adapter": "query adapter",
    "lsr": "LSR, from answers alone",
    "hybrid": "both sides, hybrid, first 50",
    "share 0.0": "base, dense",
    "share 0.5": "mean of base and both sides of squadshifts_reddit, dense",
    "share 1.0": "both sides of squadshifts_reddit, dense",
}

RERANKED = {
    f"{objective}{end}": f"reranked by what {how} taught{told}"
    for objective, how in {
        "listwise": "lists of labels",
        "bce": "labels one by one",
        "utility": "answers alone",
    }.items()
    for end, told in {"": ", scores summed", " alone": ""}.items()
}


def adaptation(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out quality_training.py's systems, each once, with what it gained on its base."""
    lines: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in rows:
        for system, of in row["systems"].items():
            way, _, search = system.partition(", ")
            own = f"{system} - base, {search}"
            gains = [v for n, v in row["differences"].items() if n.startswith(f"{system} - ")]
            gains = [row["differences"][own]] if own in row["differences"] else gains
            gain = _mean(gains[0]["nDCG@10"]) if gains else ""
            cells = [_mean(of[measure]) for measure in ("nDCG@10", "recall@10")]
            named = ", ".join(filter(None, (LEARNT.get(way, way), RERANKED.get(search, search))))
            line = row["set"], named, *cells, gain, str(of["nDCG@10"]["n"])
            lines.setdefault((row["set"], system), line)
    head = ("set", "system", "nDCG@10", "recall@10", "nDCG@10 gained", "n")
    names = list(LEARNT)

    def place(key: tuple[str, str]) -> tuple[str, int]:
        way = key[1].partition(", ")[0]
        return key[0], names.index(way) if way in names else len(names)

    return _table(head, [lines[key] for key in sorted(lines, key=place)])


PARTS = {
    "base": "as it is, prompted",
    "tokens": "50 virtual tokens",
    "as-is": "LoRA, what is retrieved",
    "mixed": "LoRA, contexts mixed",
    "both": "LoRA, what is retrieved, then 50 virtual tokens",
    "overtone": "LoRA, what is retrieved, OVERTONE",
    "replay": "LoRA, what is retrieved, replay of general texts",
    "keep": "LoRA, what is retrieved, KL to the base",
    "average": "LoRA, what is retrieved, its mean with the base",
}
ANSWERED = ("none", "retrieved", "gold", "gold+distractors")
ABSTAINED = ("retrieved", "wrong", "unanswerable")


def generator(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out quality_generator.py's parts: scores and abstentions by what is given."""
    lines = []
    for row in sorted(_parts(rows), key=_part_place):
        of = row["contexts"]
        if of.keys() >= {*ANSWERED, *ABSTAINED}:
            cells = [of[context]["F1"] for context in ANSWERED]
            cells += [of[context]["abstained"] for context in ABSTAINED]
            lines.append((_part_name(row), *map(_mean, cells)))
    head = [f"F1: {name}" for name in ANSWERED] + [f"abstained: {name}" for name in ABSTAINED]
    return _table(("the generator", *head), lines)


def forgetting(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out what the parts of quality_generator.py gained, and what the probes lost."""
    lines = []
    for row in sorted(_parts(rows), key=_part_place):
        if row["part"] != "base":
            changes = [run["probes"] for run in row["runs"].values()]
            measures = {probe: _shown(of) for probe, of in changes[0].items()}
            probes = (
                _over_seeds([of[probe][measure] for of in changes])
                for probe, measure in measures.items()
            )
            em, f1 = (_mean(row["contexts"]["retrieved"][measure]) for measure in ("EM", "F1"))
            lines.append((_part_name(row), em, f1, *probes))
    named = [f"{probe}: {measure}, after - before" for probe, measure in measures.items()]
    return _table(("the generator", "EM", "F1", *named), lines)


def _parts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["part"] in PARTS]


def _part_name(row: dict[str, Any]) -> str:
    seeds = len(row["runs"])
    return PARTS[row["part"]] + (f" ({seeds} seed{'s' * (seeds > 1)})" if row["way"] else "")


def _part_place(row: dict[str, Any]) -> int:
    return list(PARTS).index(row["part"])


def _shown(measures: dict[str, Any]) -> str:
    return "accuracy" if "accuracy" in measures else "bits per byte"


def _over_seeds(estimates: Sequence[dict[str, float]]) -> str:
    """Return the mean of the seeds' changes, and their lowest and highest bounds."""
    mean = sum(each["mean"] for each in estimates) / len(estimates)
    low, high = min(e["low"] for e in estimates), max(e["high"] for e in estimates)
    return _mean({"mean": mean, "low": low, "high": high})


def speed(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out speed.py's rows; ratios above 1 are in ragkit's favour."""
    cells = []
    for row in rows:
        if "ratio" in row:
            rates = [row["items a second"][name] for name in ("ragkit", row["peer"])]
            ratio = f"{row['ratio']:.{2 if row['ratio'] < 10 else 0}f}×"
            cells.append((row["work"], row["peer"], ratio, *map(_number, rates)))
        else:
            added = f"+{row['added milliseconds']:.0f} ms"
            cells.append((row["work"], "bare Python", added, "", ""))
    return _table(("work", "beside", "ratio", "ragkit, a second", "peer, a second"), cells)


def _mean(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "retrieval": retrieval,
    "reading": reading,
    "contexts": contexts,
    "tokens": tokens,
    "ways": ways,
    "adaptation": adaptation,
    "generator": generator,
    "forgetting": forgetting,
    "speed": speed,
}

if __name__ == "__main__":
    main()
