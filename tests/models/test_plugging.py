"""Virtual tokens in a reader, an evaluation and the commands: a tiny random model, and SmolLM2."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkit import Document, Example, Hit, Index, Pipeline, Query, evaluate, load_pipeline
from ragkit.__main__ import run_app
from ragkit.artefacts import read_json
from ragkit.errors import ModelError
from ragkit.models import Generator, VirtualTokens
from ragkit.models.virtual_tokens import start_rows, template_hash
from ragkit.readers import GeneratorReader
from ragkit.styles import STYLES

TEXTS = {
    "tin": "Tin melts at 232 degrees.",
    "lead": "Lead melts at 327 degrees.",
    "brie": "Brie is soft.",
}
HITS = [Hit(Document(name, text), 1.0) for name, text in TEXTS.items()]
QUERIES = [Query("q1", "When does tin melt?"), Query("q2", "When does lead melt?")]
COUNT = 5


@pytest.fixture
def tiny(tmp_path):
    """The folder of a tiny random Llama that reads bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        tmp_path / "tiny"
    )
    return tmp_path / "tiny"


def tokens_for(generator, placement="middle"):
    rows = start_rows(generator.model, generator.tokenizer, COUNT)
    rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    style = STYLES["virtual-tokens"].placing(placement)
    chat = generator.encoder.chat
    return VirtualTokens(
        rows,
        generator.name,
        generator.base_hash(),
        "chat" if chat else "plain",
        placement,
        style,
        template_hash(style, generator.tokenizer.chat_template if chat else None),
    )


def load(folder, placement="middle"):
    """Return the model without virtual tokens, and with some."""
    base = Generator.load(str(folder), precision="fp32", device="cpu")
    return base, Generator(
        base.model, base.tokenizer, base.name, virtual_tokens=tokens_for(base, placement)
    )


def hooks(generator):
    embedding = generator.model.get_input_embeddings()
    return len(embedding._forward_hooks) + len(embedding._forward_pre_hooks)


@pytest.mark.parametrize("placement", ["middle", "front", "last", "start"])
def test_on_and_off_by_call_and_streaming_alike(tiny, placement):
    base, plugged = load(tiny, placement)
    reader = GeneratorReader(plugged, max_new_tokens=8)
    bare = GeneratorReader(base, max_new_tokens=8, style="virtual-tokens")
    hits = [HITS, HITS[1:]]
    expected = bare.read(QUERIES, hits)
    by_count = {count: reader.read(QUERIES, hits, count) for count in (0, 1, 3, COUNT)}
    assert by_count[0] == expected
    assert by_count[COUNT] == reader.read(QUERIES, hits)
    said = {count: tuple(answer.text for answer in of) for count, of in by_count.items()}
    assert len(set(said.values())) == 4  # each number of tokens says something else
    mixed = reader.read(QUERIES * 4, hits * 4, [0, 0, 1, 1, 3, 3, COUNT, COUNT])
    assert mixed == [answer for of in by_count.values() for answer in of]
    for count, (answer, _) in by_count.items():
        pieces = []
        assert reader.stream(QUERIES[0], HITS, pieces.append, count) == answer
        assert "".join(pieces).strip() == answer.text
    assert bare.read(QUERIES, hits) == expected
    assert hooks(plugged) == 0


def test_hooks_go_after_an_exception(tiny, monkeypatch):
    base, plugged = load(tiny)
    reader = GeneratorReader(plugged, max_new_tokens=8)
    expected = GeneratorReader(base, max_new_tokens=8, style="virtual-tokens").read(
        QUERIES, [[]] * 2
    )
    seen = []

    def fail(*_, **__):
        seen.append(hooks(plugged))
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(plugged.model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            reader.read(QUERIES, [[]] * 2)
        with pytest.raises(ModelError, match="out of memory"):
            reader.stream(QUERIES[0], [], print)

    def interrupt(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reader.stream(QUERIES[0], [], interrupt)
    assert all(seen) and len(seen) == 2
    assert hooks(plugged) == 0
    assert reader.read(QUERIES, [[]] * 2, use_tokens=0) == expected


class Shelf:
    """A retriever that finds the same for every question."""

    def retrieve(self, queries, k):
        return [HITS[:k] for _ in queries]


def test_passages_are_read_once_for_all_token_counts(tiny):
    _, plugged = load(tiny)
    reader = GeneratorReader(plugged, max_new_tokens=1)
    counts, fed = [0, 1, 3, COUNT], []

    def count(_module, _arguments, options):
        fed.append(options["input_ids"].numel())

    hook = plugged.model.register_forward_pre_hook(count, with_kwargs=True)
    examples = [Example(query, answers=("232",)) for query in QUERIES]
    results = evaluate(
        Pipeline(Shelf(), reader=reader, keep=2), examples, contexts=["retrieved"],
        token_counts=counts,
    )  # fmt: skip
    hook.remove()
    assert len(results.contexts) == 5
    rows = set()
    for query in QUERIES:
        ids = plugged.encoder.encode(reader.prompt(query, HITS[:2]))
        rows |= {ids.with_tokens(tuple(range(-k, 0))[::-1], "middle") for k in counts}
    # Each beginning that rows share is read once, and each row's last token in a batch.
    beginnings = {row[:end] for row in rows for end in range(1, len(row))}
    assert sum(fed) == len(beginnings) + len(rows)
    assert sum(fed) < sum(map(len, rows)) / 2
    assert results.contexts["retrieved"] == results.contexts[f"retrieved with {COUNT} tokens"]


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A folder with an index, questions, a model and its virtual tokens; commands run in it."""
    monkeypatch.chdir(tmp_path)
    Index.build("kb", [hit.document for hit in HITS], stores=["bm25"])
    _, plugged = load(tiny)
    (tmp_path / "tokens").mkdir()
    plugged.virtual_tokens.save(tmp_path / "tokens")
    rows = [{"id": q.id, "question": q.text, "answers": ["232"]} for q in QUERIES]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


OPTIONS = ["--index", "kb", "--generator", "tiny", "--device", "cpu", "--max-new-tokens", "4"]
PLUG = ["--virtual-tokens", "tokens"]
EVALUATE = ["evaluate", *OPTIONS, "--questions", "q.jsonl", "--output", "run"]


def test_a_run_tells_its_virtual_tokens(place, capsys):
    command = [*EVALUATE, *PLUG, "--use-tokens", "3", "--contexts", "retrieved,none"]
    assert run_app([*command, "--token-counts", "0, 5"]) == 0
    assert "none with 5 tokens" in capsys.readouterr().out
    kept = read_json(place / "run" / "results.json")
    saved = VirtualTokens.load("tokens").to_json()
    assert kept["settings"]["virtual_tokens"] == saved | {
        "layout": "plain", "placement": "middle", "used": 3,
    }  # fmt: skip
    assert kept["settings"]["command"]["virtual_tokens"] == "tokens"
    assert kept["settings"]["command"]["prompt"] == "virtual-tokens"
    assert list(kept["contexts"]) == [
        f"{context}{counted}"
        for context in sorted(["retrieved", "none"])
        for counted in ("", " with 0 tokens", " with 5 tokens")
    ]


def test_commands_and_settings_files_plug_virtual_tokens(place, capsys):
    base, plugged = load(place / "tiny")
    whole = GeneratorReader(plugged, max_new_tokens=4)

    def ask(*options):
        assert run_app(["ask", "When does tin melt?", *OPTIONS, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["answer"]

    pipeline = load_pipeline(
        "kb", virtual_tokens="tokens/", generator="tiny", max_new_tokens=4, device="cpu"
    )
    question = Query("question", "When does tin melt?")
    hits = pipeline.retrieve([question])
    texts = [whole.read([question], hits, count)[0].text for count in (COUNT, 3, 0)]
    assert len(set(texts)) == 3
    assert ask(*PLUG) == pipeline.ask(question.text).text == texts[0]
    assert ask(*PLUG, "--use-tokens", "3") == texts[1]
    assert ask(*PLUG, "--use-tokens", "0") == ask("--prompt", "virtual-tokens") == texts[2]
    spring = GeneratorReader(base, style="ragkit", max_new_tokens=4).read([question], hits)[0]
    assert ask("--use-tokens", "0") == spring.text  # without virtual tokens, 0 is what there is
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rag.toml").write_text(
        'index = "../kb"\nvirtual-tokens = "../tokens"\nuse_tokens = 3\n'
        f'generator = "{place}/tiny"\nmax_new_tokens = 4\ndevice = "cpu"\n'
    )
    assert load_pipeline(elsewhere / "rag.toml").ask(question.text).text == texts[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["ask", "x", *OPTIONS, *PLUG, "--use-tokens", "6"], "these are 5"),
        (["ask", "x", *OPTIONS, "--use-tokens", "1"], "has none plugged in"),
        (["ask", "x", *OPTIONS, *PLUG, "--prompt", "spring"], "learnt with, which is 'virtual-to"),
        (["ask", "x", *OPTIONS, *PLUG, "--server", "http://127.0.0.1:9/v1"], "sent text"),
        ([*EVALUATE, "--token-counts", "1"], "no reader here has virtual tokens"),
        ([*EVALUATE, *PLUG, "--no-reader", "--token-counts", "1"], "no reader here"),
        ([*EVALUATE, *PLUG, "--token-counts", "1,6"], "not at [6]"),
        ([*EVALUATE, *PLUG, "--token-counts", "1,1"], "asked for twice"),
        ([*EVALUATE, *PLUG, "--token-counts", "0.5"], "--token-counts holds '0.5', which is no w"),
        ([*EVALUATE, "--noise", "half"], "--noise holds 'half', which is no number"),
    ],
)
def test_what_virtual_tokens_cannot_do_is_bad_usage(place, capsys, command, message):
    assert run_app(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (place / "run").exists()


def test_smollm2_unplugged_is_smollm2(generator):
    plugged = Generator(
        generator.model, generator.tokenizer, generator.name, virtual_tokens=tokens_for(generator)
    )
    reader = GeneratorReader(plugged, max_new_tokens=4)
    bare = GeneratorReader(generator, style="virtual-tokens", max_new_tokens=4)
    query, hits = QUERIES[1:], [HITS[:1]]
    off = bare.read(query, hits)
    assert reader.read(query, hits, use_tokens=0) == off
    mixed = reader.read(query * 2, hits * 2, [COUNT, 0])
    assert mixed[1:] == off and mixed[0].text != mixed[1].text
