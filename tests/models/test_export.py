"""Exported folders: transformers alone reads them as ragkit reads base and virtual tokens."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ragkit.__main__ import run_app
from ragkit.errors import ModelError
from ragkit.models import Generator
from ragkit.models.prompt_ids import until_stop
from ragkit.models.virtual_tokens import VirtualTokens, start_rows, template_hash
from ragkit.prompts import build_prompt
from ragkit.splitting import sentences
from ragkit.styles import STYLES
from ragkit.types import Document, Hit

SPECIAL = ["<s>", "</s>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}\n"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
FAMILIES = {
    "llama": {**SIZES, "tie_word_embeddings": True},
    "qwen2": {**SIZES, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "gemma3_text": {**SIZES, "head_dim": 8, "tie_word_embeddings": True},
    "phi": {**SIZES, "tie_word_embeddings": False},
}
TEXTS = [
    ("Tin", "Tin melts at 232 degrees."),
    ("", "Brie is soft. It melts too."),
    ("Lead", "Lead?"),
]


def tiny_tokenizer(merges=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = SPECIAL + alphabet + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def base_folder(path, family="llama", padding=0, dtype=torch.float32, merges=(), **options):
    """Write a random model and its tokenizer; return the folder's name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    config.save_pretrained(path)
    tiny_tokenizer(merges).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)  # some families add tokens of their own
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer) + padding, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, initializer_range=0.3, **{**FAMILIES[family], **options},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(path)
    return str(path)


def tokens_for(name, generator, count=5, placement="middle"):
    torch.manual_seed(1)
    chat = generator.encoder.chat
    template = generator.tokenizer.chat_template if chat else None
    style = STYLES["virtual-tokens"].placing(placement)
    rows = start_rows(generator.model, generator.tokenizer, count)
    return VirtualTokens(
        rows + 0.3 * rows.std() * torch.randn_like(rows),
        name,
        generator.base_hash(),
        "chat" if chat else "plain",
        placement,
        style,
        template_hash(style, template),
    )


def prompts_for(tokens):
    hits = [Hit(Document(str(i), text, title), 1.0) for i, (title, text) in enumerate(TEXTS)]
    return [
        build_prompt(
            tokens.style, f"Why {count} metals?", hits[:count],
            budget=9999, window=9999, count=len, sentences=sentences,
        )
        for count in range(4)
    ]  # fmt: skip


def export(tmp_path, base, tokens, *options):
    (folder := tmp_path / "tokens").mkdir()
    tokens.save(folder)
    output = tmp_path / "exported"
    arguments = ["export", "--base", base, "--virtual-tokens", str(folder), "--output", str(output)]
    assert run_app([*arguments, *options]) == 0
    return output


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def texts_of(generator, tokens, manifest):
    """Return prompts' texts as a user of the folder writes them: by the documented string."""
    encoder, string = generator.encoder, manifest["tokens"]
    return [encoder.text(prompt, string, tokens.placement) for prompt in prompts_for(tokens)]


def agree(generator, tokens, output, atol):
    """Compare greedy answers and logits of both ways, prompt by prompt."""
    model, tokenizer = loaded(output)
    manifest = json.loads((output / "virtual_tokens.json").read_text())
    special = manifest["example"]["add_special_tokens"]
    first, count = manifest["first_id"], manifest["count"]
    prompts = prompts_for(tokens)
    plugged = [tokens.first(count)] * len(prompts)
    expected = generator.generate(prompts, max_new_tokens=12, virtual_tokens=plugged)
    rows = generator.model.get_input_embeddings().weight
    for prompt, text, answer in zip(
        prompts, texts_of(generator, tokens, manifest), expected, strict=True
    ):
        inputs = tokenizer(text, add_special_tokens=special, return_tensors="pt")
        ids = inputs["input_ids"]
        beyond = range(first, first + count)
        assert ids[0].tolist() == list(
            generator.encoder.encode(prompt).with_tokens(tuple(beyond), tokens.placement)
        )
        with torch.no_grad():
            found = model(**inputs).logits[0, :, :first]
            embedded = generator.model.get_input_embeddings()(ids.clamp(max=len(rows) - 1))
            places = ids[0] >= first
            embedded[0, places] = tokens.embeddings[:count].to(embedded.dtype)
            base = generator.model(inputs_embeds=embedded).logits[0, :, :first]
        torch.testing.assert_close(found, base, atol=atol, rtol=1e-3)
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=1)
        said = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        if tokens.layout == "plain":
            said = "".join(until_stop([said]))
        assert said.strip() == answer
    return model, tokenizer, manifest


def test_transformers_alone_answers_as_ragkit_does(generator, tmp_path):
    tokens = tokens_for("SmolLM2-135M-Instruct", generator, count=20)
    output = export(tmp_path, "SmolLM2-135M-Instruct", tokens, "--use-tokens", "8")
    model, tokenizer, manifest = agree(generator, tokens, output, atol=1e-3)
    assert (manifest["count"], manifest["trained"], model.dtype) == (8, 20, torch.float32)
    assert len(tokenizer) == model.config.vocab_size == 49_160
    assert manifest["highest_probability_in_example"] < 1e-6
    assert not {file.suffix for file in output.iterdir()} & {".bin", ".pt", ".pkl"}
    readme = (output / "README.md").read_text()
    assert manifest["example"]["text"] in readme and "$" not in readme
    said = tokenizer.apply_chat_template(
        manifest["example"]["messages"], tokenize=False, add_generation_prompt=True
    )
    assert said == manifest["example"]["text"]


@pytest.mark.parametrize("layout", ["chat", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_reads_its_tokens_as_words(tmp_path, family, layout):
    base = base_folder(tmp_path / "base", family)
    generator = Generator.load(base, precision="fp32", device="cpu", layout=layout)
    tokens = tokens_for(base, generator)
    output = export(tmp_path, base, tokens)
    model, _, manifest = agree(generator, tokens, output, atol=1e-4)
    assert model.config.tie_word_embeddings is False
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() != table.weight.data_ptr()
    torch.testing.assert_close(
        table(torch.arange(manifest["first_id"], model.config.vocab_size)), tokens.embeddings
    )
    if head.bias is not None:
        assert (head.bias[-5:] < -1000).all() and (head.bias[:-5] > -1000).all()
    with safe_open(output / "model.safetensors", "pt") as file:
        assert len([name for name in file.keys() if "lm_head.weight" in name]) == 1  # noqa: SIM118


@pytest.mark.parametrize("placement", ["start", "front", "last"])
@pytest.mark.parametrize("layout", ["chat", "plain"])
def test_tokens_stand_where_they_were_learnt_to(tmp_path, placement, layout):
    base = base_folder(tmp_path / "base")
    generator = Generator.load(base, precision="fp32", device="cpu", layout=layout)
    tokens = tokens_for(base, generator, placement=placement)
    agree(generator, tokens, export(tmp_path, base, tokens), atol=1e-4)


@pytest.mark.parametrize("padding", [2, 5, 64])
def test_rows_are_written_where_the_ids_are_in_a_padded_vocabulary(tmp_path, padding):
    base = base_folder(tmp_path / "base", "qwen2", padding)
    generator = Generator.load(base, precision="fp32", device="cpu")
    tokens = tokens_for(base, generator)
    model, tokenizer, manifest = agree(generator, tokens, export(tmp_path, base, tokens), atol=1e-4)
    first = manifest["first_id"]
    assert first == len(generator.tokenizer) == len(tokenizer) - 5
    assert model.config.vocab_size == first + max(padding, 5)
    assert torch.equal(model.get_input_embeddings().weight[first : first + 5], tokens.embeddings)
    for ours, its in ((model.model.embed_tokens, generator.model.model.embed_tokens),
                      (model.lm_head, generator.model.lm_head)):  # fmt: skip
        assert torch.equal(ours.weight[:first], its.weight[:first])
        assert torch.equal(ours.weight[first + 5 :], its.weight[first + 5 :])


def test_no_state_makes_a_virtual_token_the_likeliest(tmp_path):
    base = base_folder(tmp_path / "base")
    generator = Generator.load(base, precision="fp32", device="cpu")
    tokens = tokens_for(base, generator)
    model, _ = loaded(export(tmp_path, base, tokens))
    states = torch.randn(20_000, 32) * torch.logspace(-3, 3, 20_000)[:, None]
    rows = model.lm_head.weight.detach()
    states = torch.cat([states, 100 * rows[-5:], -100 * rows[-5:]])  # tempting ones, too
    logits = states @ rows.T
    assert int(logits.argmax(-1).max()) < len(rows) - 5
    # Jensen: a mean logit is at most the mean probability of those whose mean it is.
    assert float(logits.softmax(-1)[:, -1].max()) <= 1 / 128


def test_transformers_forbids_the_ids_even_where_they_would_win(tmp_path):
    base = base_folder(tmp_path / "base")
    generator = Generator.load(base, precision="fp32", device="cpu")
    model, tokenizer = loaded(export(tmp_path, base, tokens_for(base, generator)))
    inputs = tokenizer("Why?", return_tensors="pt")
    with torch.no_grad():
        state = model.model(**inputs).last_hidden_state[0, -1]
        model.lm_head.weight[-5:] = 100 * state
    first = model.config.vocab_size - 5
    assert int(model(**inputs).logits[0, -1].argmax()) >= first
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 1}
    assert int(model.generate(**inputs, **options, do_sample=False).max()) < first
    assert int(model.generate(**inputs, **options, do_sample=True, top_k=0).max()) < first
    model.generation_config.suppress_tokens = None
    assert int(model.generate(**inputs, **options, do_sample=False).max()) >= first


def test_an_adapter_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    base = base_folder(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        modules_to_save=["lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    adapted.save_pretrained(tmp_path / "lora")
    name = str(tmp_path / "lora")
    generator = Generator.load(name, precision="fp32", device="cpu")
    tokens = tokens_for(name, generator)
    output = export(tmp_path, name, tokens)
    model, _, _ = agree(generator, tokens, output, atol=1e-3)
    assert not [key for key in model.state_dict() if "lora" in key or "base_layer" in key]
    assert not (output / "adapter_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type(tmp_path, dtype):
    base = base_folder(tmp_path / "base", dtype=dtype)
    generator = Generator.load(base, precision="fp32", device="cpu")
    tokens = tokens_for(base, generator)
    model, _ = loaded(export(tmp_path, base, tokens))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    rows = model.get_input_embeddings().weight[-5:]
    assert torch.equal(rows, tokens.embeddings.to(dtype))
    own = generator.model.model.embed_tokens.weight
    assert torch.equal(model.get_input_embeddings().weight[:-5], own.to(dtype))


def test_a_chat_template_takes_the_placeholder_and_changes_nothing_else(tmp_path):
    base = base_folder(tmp_path / "base")
    generator = Generator.load(base, precision="fp32", device="cpu")
    _, tokenizer = loaded(export(tmp_path, base, tokens_for(base, generator)))
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<|virtual_tokens|>Why?"},
        {"role": "assistant", "content": "So.\n"},
    ]
    for prompted in (True, False):
        own, ours = (
            each.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompted)
            for each in (generator.tokenizer, tokenizer)
        )
        string = "".join(f"<|virtual_{n}|>" for n in range(1, 6))
        assert ours == own.replace("<|virtual_tokens|>", string) != own
    ids = tokenizer.encode("a <|virtual_2|> b", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == ["a", " ", "<|virtual_2|>", " ", "b"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a  b"


def test_a_text_whose_ids_differ_is_told(tmp_path, capsys):
    base = base_folder(tmp_path / "base", merges=[("?", "Ċ")])
    generator = Generator.load(base, precision="fp32", device="cpu")
    output = export(tmp_path, base, tokens_for(base, generator))
    example = json.loads((output / "virtual_tokens.json").read_text())["example"]
    assert example["text_gives_these_ids"] is False
    _, tokenizer = loaded(output)
    assert tokenizer.decode(example["ids"]) == example["text"]
    assert "joins characters across the parts" in capsys.readouterr().err
    assert "joins characters across the parts" in (output / "README.md").read_text()


def refused(tmp_path, base, tokens, message, *options, code=1, capsys):
    (folder := tmp_path / "tokens").mkdir(exist_ok=True)
    tokens.save(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    output = tmp_path / "exported"
    arguments = ["export", "--base", base, "--virtual-tokens", str(folder), "--output", str(output)]
    capsys.readouterr()
    assert run_app([*arguments, *options]) == code
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path, capsys):
    base = base_folder(tmp_path / "base")
    other = base_folder(tmp_path / "other", "llama", num_hidden_layers=1)
    generator = Generator.load(base, precision="fp32", device="cpu")
    tokens = tokens_for(base, generator)
    refused(tmp_path, other, tokens, "learnt on", capsys=capsys)
    refused(tmp_path, base, tokens, "6 virtual tokens", "--use-tokens", "6", code=2, capsys=capsys)
    refused(tmp_path, base, tokens, "use-tokens", "--use-tokens", "0", code=2, capsys=capsys)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "note").write_text("mine")
    refused(tmp_path, base, tokens, "exists already", code=2, capsys=capsys)
    refused(tmp_path, base, tokens, "is not replaced", "--replace", code=2, capsys=capsys)


def test_a_base_without_a_place_for_the_tokens_is_refused(tmp_path, capsys):
    for name, words, padding, message in [
        ("long", ["<a>", "<b>"], 0, "model and tokenizer do not fit"),
        ("again", ["<|virtual_3|>"], 8, r"knows <\|virtual_3\|> already"),
    ]:
        base = base_folder(tmp_path / name, padding=padding)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(words, special_tokens=True)
        tokenizer.save_pretrained(base)
        generator = Generator.load(base, precision="fp32", device="cpu")
        refused(tmp_path, base, tokens_for(base, generator), message, capsys=capsys)
    base = base_folder(tmp_path / "hidden", padding=8)
    config = AutoConfig.from_pretrained(base)
    config.pad_token_id = config.vocab_size - 7
    config.save_pretrained(base)
    generator = Generator.load(base, precision="fp32", device="cpu")
    refused(tmp_path, base, tokens_for(base, generator), "uses the id", capsys=capsys)


def test_a_model_that_ties_its_ends_whatever_it_is_told_is_refused(tmp_path, capsys, monkeypatch):
    base = base_folder(tmp_path / "base")
    generator = Generator.load(base, precision="fp32", device="cpu")

    class Tied:
        @staticmethod
        def from_pretrained(*arguments, **options):
            model = AutoModelForCausalLM.from_pretrained(*arguments, **options)
            model.lm_head.weight = model.model.embed_tokens.weight
            return model

    monkeypatch.setattr("ragkit.models.export.AutoModelForCausalLM", Tied)
    refused(tmp_path, base, tokens_for(base, generator), "ties its embeddings", capsys=capsys)


def test_an_exported_folder_is_replaced_when_asked(tmp_path):
    base = base_folder(tmp_path / "base")
    generator = Generator.load(base, precision="fp32", device="cpu")
    tokens = tokens_for(base, generator)
    output = export(tmp_path, base, tokens)
    arguments = ["export", "--base", base, "--virtual-tokens", str(tmp_path / "tokens")]
    again = [*arguments, "--output", str(output), "--use-tokens", "2"]
    assert run_app(again) == 2
    assert run_app([*again, "--replace"]) == 0
    assert json.loads((output / "virtual_tokens.json").read_text())["count"] == 2
    with pytest.raises(ModelError, match="learnt on"):
        Generator.load(str(output), virtual_tokens=tokens)  # another model than its base
